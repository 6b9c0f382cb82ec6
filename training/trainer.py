"""The training loop's body: one global batch in, one optimizer step out.

Read `Trainer.step` first: it is the whole of training, top to bottom. Everything that differs between one process and
two thousand is inside the dispatcher, the optimizer's reductions and two all-reduces of statistics.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..checkpoint import store
from ..checkpoint.manifest import check_same_model, read_manifest
from ..comm.meter import numbers_of, traffic_of
from ..configs.config import Config
from ..data.loader import Batch, Loader, evaluation_batches
from ..data.open import Data
from ..model.counts import flops_per_token
from ..model.router import update_bias
from ..model.transformer import MicroBatch, Output, Weights
from ..parallel.executor import Program, microbatches_of
from ..parallel.groups import Groups
from ..parallel.schedule.actions import Schedule, forward_only
from ..plan.pipeline import make_schedule
from ..plan.steps import Progress, steps_from
from ..report.balance import measure_balance
from ..report.hardware import Peak, memory_gib
from ..report.metrics import StepMetrics, utilization
from ..report.traffic import Sent
from .build import build_executor, build_model, build_optimizer, dp_rank
from .expert_balance import ExpertBalance
from .non_finite import explain_non_finite
from .objective import dropping_of, loss_weights
from .trace import PipelineTrace, gather_trace

AVERAGE = "ema."
"""How the names of the moving average's tensors begin in a checkpoint."""

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """Sums over micro-batches, and after `all_reduce` over ranks."""

    losses: Tensor
    """FP64 `[4 + D]`: next-token loss, three balance losses, one MTP loss a depth."""
    counts: Tensor
    """`[L, E]` int64: tokens that chose each expert."""
    dropped: Tensor
    """`[L]` int64: (token, expert) pairs of them that were dropped."""
    sent: Tensor
    """What ranks sent since the sums of the step before, as `comm/meter.py: numbers_of` lists it."""


class Trainer:
    """A model, its optimizer and its data at one point of a run."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        device: torch.device,
        data: Data,
        peak: Peak | None = None,
        partial_sums: Sequence[int] | None = None,
    ) -> None:
        """`partial_sums`: see `build_model`."""
        self.config, self.groups, self.device, self.data, self.peak = config, groups, device, data, peak
        self.model = build_model(config, groups, device, partial_sums)
        self.optimizer = build_optimizer(config, self.model, groups)
        self.executor = build_executor(config, self.model, groups, device)
        self.experts = ExpertBalance(config, groups, self.model, self.optimizer, device)
        self.progress = Progress()
        self._loader: Loader | None = None
        self._programs: dict[tuple[int, bool], tuple[Schedule, Program]] = {}
        self._flops = flops_per_token(config.model, config.batch.sequence_length)

    def step(self, timed: bool = False) -> StepMetrics:
        """Train on the next global batch. Raises NonFiniteError, before any weight moves, if a number is not finite.

        `timed` makes a GPU finish each action of the pipeline before the next, so that `trace` shows its time.
        """
        started = time.perf_counter()
        config, before = self.config, self.progress
        self.experts.rebalance(before.step)
        micro_batches, sequences = self._next_batch()
        tokens = sequences * self.config.batch.sequence_length
        lr = self.config.optim.lr.at(before.tokens)
        speed = config.balance.bias_update_speed.at(before.tokens)
        mtp_weight = config.train.mtp_weight.at(before.tokens)
        weights = loss_weights(self.config, before, sequences)

        if timed:
            self.optimizer.finish_gathers()  # the trace is of the pipeline alone
        self.executor.timed = timed
        totals = self._sum(self.forward_backward(micro_batches, weights))
        norm = self.optimizer.reduce_gradients()
        if not math.isfinite(norm) or not bool(totals.losses.isfinite().all()):  # equal on all ranks: all stop
            raise explain_non_finite(self, micro_batches, weights)
        self.optimizer.step(lr, norm, blocking=not self.config.optim.overlap_gather)
        for layer, router in self.model.routers():
            if router.bias is not None:
                update_bias(router.bias, totals.counts[layer], speed)
        self.experts.measure(totals.counts, before.step + 1)

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
            bias_update_speed=speed if self.config.model.has_router_bias else 0.0,
            mtp_weight=mtp_weight,
            memory_gib=memory_gib(self.device).peak,
            step_seconds=seconds,
            traffic=_traffic(totals.sent),
            **self._speed(tokens / seconds),
        )

    def forward_backward(self, batches: list[Batch], weights: Weights) -> list[Output]:
        """All micro-batches of a step through the pipeline: their gradients are in the optimizer's FP32 sums.

        Returns the losses and counts of every chunk of this rank for every micro-batch it served.
        """
        self.model.recipe.monitor.infinite.clear()
        for chunk in self.model.chunks.values():
            chunk.train()
        schedule, program = self._last = self._program(len(batches))
        served = microbatches_of(schedule, program.rank)
        self.optimizer.begin_step(self.model.accumulations(served))
        return self.executor.train(program, [self._on_device(batch, weights) for batch in batches])

    def validate(self) -> dict[str, float]:
        """`validation_loss`, and `validation_loss_ema` of the averaged weights where there are any."""
        losses = {"validation_loss": self.evaluate()}
        if self.optimizer.ema is not None and self.config.train.evaluate_ema:
            with self.optimizer.averaged():
                losses["validation_loss_ema"] = self.evaluate()
        return losses

    def evaluate(self) -> float:
        """Mean next-token loss, in nats a token, over the held-out sequences."""
        self.optimizer.finish_gathers()
        for chunk in self.model.chunks.values():
            chunk.eval()
        batches = list(
            evaluation_batches(
                self.data.validation,
                self.config.train.evaluate_sequences,
                dp_rank(self.groups),
                self.groups.layout.dp,
                self.config.batch.micro_sequences,
            )
        )
        _, program = self._program(len(batches), training=False)
        with self.groups.meter.aside(), self.experts.for_evaluation():
            outputs = self.executor.evaluate(program, [self._on_device(batch) for batch in batches])
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for output in outputs:
            sums[0] += output.loss
        if self.groups.coordinates.pp == 0:  # every pipeline rank has the same sequences
            sums[1] = sum(int(batch.valid.sum()) for batch in batches) * self.config.batch.sequence_length
        self.groups.sum(sums)
        return float(sums[0] / sums[1])

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this point into `folder`; every rank calls it."""
        optimizer = self.optimizer
        record = {**vars(self.progress), "optimizer_steps": optimizer.steps, "data_digest": self.data.digest}
        record |= self.experts.record()
        if optimizer.ema is not None:
            record["ema_updates"] = optimizer.ema.updates
        return store.save(
            folder,
            self.progress.step,
            self._state(),
            self.config.model.model_dump(mode="json"),
            record,
            self.groups.world,
            self.config.checkpoint.keep,
        )

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from checkpoint `path`, whatever layout wrote it; returns its progress record."""
        model = self.config.model.model_dump(mode="json")
        manifest = read_manifest(path)
        check_same_model(manifest, model, path)
        self.experts.restore(manifest.progress)
        record = store.load(path, self._state(), model, self.groups.world, optional=AVERAGE)
        self.progress = Progress(**{key: record[key] for key in ("step", "tokens", "sequences")})
        self.optimizer.steps = record["optimizer_steps"]
        self.optimizer.publish()
        self._restore_average(record.get("ema_updates"), path)
        self.close()
        return record

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _restore_average(self, updates: int | None, path: Path) -> None:
        """Go on with the average of a checkpoint, which has seen `updates` steps; None where it has no average."""
        ema = self.optimizer.ema
        if ema is None:
            if updates is not None:
                logger.info("the average of the weights in %s is left behind: optim.ema_decay is null", path)
        elif updates is None:
            ema.restart(updates=1)
            logger.warning("%s has no average of the weights: it begins with the weights of this step", path)
        else:
            ema.updates = updates

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

    def trace(self) -> PipelineTrace | None:
        """How the pipeline spent the last step, on rank 0; None elsewhere. Every rank calls it."""
        schedule, program = self._last
        return gather_trace(self.groups, schedule, program, self.executor.spans)

    def _program(self, num_microbatches: int, training: bool = True) -> tuple[Schedule, Program]:
        """The schedule of a step, or of its forwards alone, and this rank's part of it."""
        if (num_microbatches, training) not in self._programs:
            schedule = make_schedule(self.config, num_microbatches)
            if not training:
                schedule = forward_only(schedule)
            program = Program.of(schedule, self.groups.coordinates.pp, training)
            # A ramp passes through many sizes of the batch, and none comes back.
            self._programs = {key: kept for key, kept in self._programs.items() if key[1] != training}
            self._programs[num_microbatches, training] = schedule, program
        return self._programs[num_microbatches, training]

    def _on_device(self, batch: Batch, weights: Weights | None = None) -> MicroBatch:
        """To train on with `weights`, or without them to evaluate: then no MTP module runs and no token is dropped."""
        tokens, valid = batch.tokens.to(self.device), batch.valid.to(self.device)
        if weights is None:
            return MicroBatch(tokens, valid, mtp=False)
        return MicroBatch(tokens, valid, weights, dropping=dropping_of(self.config, batch, self.device))

    def _state(self) -> dict[str, DTensor]:
        """Everything a checkpoint holds; filling these tensors changes this trainer."""
        biases = {
            f"weights.{name}": DTensor.from_local(
                bias, self.groups.replicas("dp", holders), [Replicate()], run_check=False
            )
            for name, bias, holders in self.model.biases()
        }
        return {**self.optimizer.state(), **biases, **self.optimizer.averages()}

    def _sum(self, parts: list[Output]) -> Totals:
        """Sum over micro-batches, stages and ranks, in FP64 so that the order cannot be seen."""
        model = self.config.model
        depths = model.num_nextn_predict_layers
        losses = torch.zeros(4 + depths, dtype=torch.float64, device=self.device)
        counts = torch.zeros(model.num_moe_layers, model.n_routed_experts + 1, dtype=torch.int64, device=self.device)
        for part in parts:
            numbers = (part.loss, part.balance, part.device, part.communication, *part.mtp_losses)
            losses[: len(numbers)] += torch.stack(numbers).double()
            counted = torch.cat((part.counts, part.dropped.unsqueeze(1)), 1)
            counts[part.first_moe : part.first_moe + len(counted)] += counted
        if self.model.recipe.monitor.infinite:  # where this step quantised an infinity, which then is a finite number
            losses.fill_(math.nan)
        self.groups.sum(losses)
        sent = torch.tensor(numbers_of(self.groups.meter.take()), device=self.device)
        whole = torch.cat((counts.view(-1), sent))
        self.groups.sum(whole)
        counts, sent = whole[: counts.numel()].view(counts.shape), whole[counts.numel() :]
        return Totals(losses, counts[:, :-1], counts[:, -1], sent)

    def _losses(self, totals: Totals, tokens: int, sequences: int) -> dict[str, Any]:
        loss, balance, device, communication, *mtp = totals.losses.tolist()
        losses = {"loss": loss / tokens, "loss_mtp": sum(mtp) / len(mtp) / tokens if mtp else None}
        if not totals.counts.numel():
            return losses
        losses["loss_balance"] = balance / sequences
        if self.config.model.n_group > 1:
            losses |= {"loss_device": device / sequences, "loss_communication": communication / sequences}
        layers = measure_balance(totals.counts.cpu(), totals.dropped.cpu(), self.experts.rank_of_expert, self._nodes())
        return {**losses, **layers.summary(), "layers": layers}

    def _nodes(self) -> list[int]:
        """For each rank of the first expert parallel group its node."""
        return [self.groups.layout.node(rank) for rank in next(self.groups.layout.ep_groups())]

    def _speed(self, tokens_per_second: float) -> dict[str, Any]:
        mfu = None
        if self.peak is not None:
            mfu = utilization(tokens_per_second, self._flops, self.groups.layout.world_size, self.peak.tflops)
        return {"tokens_per_second": tokens_per_second, "mfu": mfu}


def _traffic(sent: Tensor) -> tuple[Sent, ...]:
    return tuple(Sent(**vars(kind), **vars(tally)) for kind, tally in traffic_of(sent.tolist()).items())
