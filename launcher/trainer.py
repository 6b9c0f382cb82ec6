"""The training loop's body: one global batch in, one optimizer step out.

Read `Trainer.step` first: it is the whole of training, top to bottom. Everything that differs between one process and
two thousand is inside the dispatcher, the optimizer's reductions and two all-reduces of statistics.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..checkpoint import store
from ..data.loader import Batch, Loader, evaluation_batches
from ..data.open import Data
from ..model.counts import flops_per_token
from ..model.naming import router_biases
from ..model.router import update_bias
from ..model.transformer import Output
from ..parallel.groups import Groups
from ..report.hardware import Peak, memory_gib
from ..report.metrics import StepMetrics, max_violation, utilization
from .build import build_model, build_optimizer, dp_rank
from .config import Config
from .diagnose import explain_non_finite
from .plan_steps import Progress, steps_from


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss are multiplied by: means over the global batch, and the recipe's weights."""

    token: float
    mtp: float
    balance: float


@dataclass
class Totals:
    """Sums over micro-batches, and after `all_reduce` over ranks."""

    losses: Tensor
    """FP64 `[2 + D]`: next-token loss, balance loss, one MTP loss a depth."""
    counts: Tensor
    """`[L, E]` int64."""


class Trainer:
    """A model, its optimizer and its data at one point of a run."""

    def __init__(
        self, config: Config, groups: Groups, device: torch.device, data: Data, peak: Peak | None = None
    ) -> None:
        self.config, self.groups, self.device, self.data, self.peak = config, groups, device, data, peak
        self.model = build_model(config, groups, device)
        self.optimizer = build_optimizer(config, self.model, groups)
        self.progress = Progress()
        self._loader: Loader | None = None
        self._flops = flops_per_token(config.model, config.batch.sequence_length)

    def step(self) -> StepMetrics:
        """Train on the next global batch. Raises NonFiniteError, before any weight moves, if a number is not finite."""
        started = time.perf_counter()
        train, before = self.config.train, self.progress
        micro_batches, sequences = self._next_batch()
        tokens = sequences * self.config.batch.sequence_length
        lr = self.config.optim.lr.at(before.tokens)
        speed, mtp_weight = train.bias_update_speed.at(before.tokens), train.mtp_weight.at(before.tokens)
        depth = max(1, self.config.model.num_nextn_predict_layers)
        weights = Weights(1 / tokens, mtp_weight / depth / tokens, train.balance_loss / sequences)

        self.model.train()
        self.optimizer.zero_gradients()
        parts = [self.forward_backward(batch, weights) for batch in micro_batches]
        totals = self._sum(parts)
        norm = self.optimizer.reduce_gradients()
        if not math.isfinite(norm) or not bool(totals.losses.isfinite().all()):  # equal on all ranks: all stop
            raise explain_non_finite(self, micro_batches, weights)
        self.optimizer.step(lr, norm)
        for router, counts in zip(self.model.routers(), totals.counts, strict=True):
            update_bias(router.bias, counts, speed)

        self.progress = before.advanced(sequences, self.config.batch.sequence_length)
        losses = self._losses(totals, tokens, sequences)  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - started
        return StepMetrics(
            step=self.progress.step,
            tokens=self.progress.tokens,
            sequences=sequences,
            **losses,
            grad_norm=norm,
            lr=lr,
            bias_update_speed=speed,
            mtp_weight=mtp_weight,
            memory_gib=memory_gib(self.device).peak,
            step_seconds=seconds,
            **self._speed(tokens / seconds),
        )

    def forward_backward(self, batch: Batch, weights: Weights) -> Output:
        """One micro-batch: gradients are added to the optimizer's FP32 sums, the returned losses are detached."""
        tokens = batch.tokens.to(self.device)
        out: Output = self.model(tokens, batch.valid.to(self.device))
        loss = out.loss * weights.token + out.balance * weights.balance
        for mtp_loss in out.mtp_losses:
            loss = loss + mtp_loss * weights.mtp
        loss.backward()
        return Output(out.loss.detach(), tuple(x.detach() for x in out.mtp_losses), out.balance.detach(), out.counts)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean next-token loss, in nats a token, over the held-out sequences."""
        self.model.eval()
        batch = self.config.batch
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batch in evaluation_batches(
            self.data.validation,
            self.config.train.evaluate_sequences,
            dp_rank(self.groups),
            self.groups.layout.dp,
            batch.micro_sequences,
        ):
            out: Output = self.model(micro_batch.tokens.to(self.device), micro_batch.valid.to(self.device), mtp=False)
            sums[0] += out.loss
            sums[1] += int(micro_batch.valid.sum()) * batch.sequence_length
        dist.all_reduce(sums, group=self.groups.dp)
        return float(sums[0] / sums[1])

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this point into `folder`; every rank calls it."""
        return store.save(
            folder,
            self.progress.step,
            self._state(),
            self.config.model.model_dump(mode="json"),
            {**vars(self.progress), "optimizer_steps": self.optimizer.steps, "data_digest": self.data.digest},
            self.groups.world,
            self.config.checkpoint.keep,
        )

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from checkpoint `path`, whatever layout wrote it; returns its progress record."""
        model = self.config.model.model_dump(mode="json")
        record = store.load(path, self._state(), model, self.groups.world)
        self.progress = Progress(**{key: record[key] for key in ("step", "tokens", "sequences")})
        self.optimizer.steps = record["optimizer_steps"]
        self.optimizer.publish()
        self.close()
        return record

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _next_batch(self) -> tuple[list[Batch], int]:
        if self._loader is None:
            self._loader = Loader(
                self.data.train,
                ((at.sequences, count) for at, count in steps_from(self.progress, self.config.batch)),
                dp_rank=dp_rank(self.groups),
                dp_size=self.groups.layout.dp,
                micro_sequences=self.config.batch.micro_sequences,
                prefetch=self.config.data.prefetch,
            )
        return next(self._loader), self.config.batch.sequences_at(self.progress.tokens)

    def _state(self) -> dict[str, DTensor]:
        """Everything a checkpoint holds; filling these tensors changes this trainer."""
        biases = {
            f"weights.{name}": DTensor.from_local(bias, self.groups.dp_mesh, [Replicate()], run_check=False)
            for name, bias in router_biases(self.model).items()
        }
        return {**self.optimizer.state(), **biases}

    def _sum(self, parts: list[Output]) -> Totals:
        """Sum over micro-batches and ranks, in FP64 so that the order cannot be seen."""
        losses = torch.stack([torch.stack((part.loss, part.balance, *part.mtp_losses)).double() for part in parts])
        totals = Totals(losses.sum(0), torch.stack([part.counts for part in parts]).sum(0))
        dist.all_reduce(totals.losses, group=self.groups.dp)
        dist.all_reduce(totals.counts, group=self.groups.dp)
        return totals

    def _losses(self, totals: Totals, tokens: int, sequences: int) -> dict[str, Any]:
        loss, balance, *mtp = totals.losses.tolist()
        moe = bool(totals.counts.numel())
        mean_vio, worst_vio = max_violation(totals.counts) if moe else (None, None)
        return {
            "loss": loss / tokens,
            "loss_mtp": sum(mtp) / len(mtp) / tokens if mtp else None,
            "loss_balance": balance / sequences if moe else None,
            "max_vio": mean_vio,
            "max_vio_worst": worst_vio,
        }

    def _speed(self, tokens_per_second: float) -> dict[str, Any]:
        mfu = None
        if self.peak is not None:
            mfu = utilization(tokens_per_second, self._flops, self.groups.layout.world_size, self.peak.tflops)
        return {"tokens_per_second": tokens_per_second, "mfu": mfu}
