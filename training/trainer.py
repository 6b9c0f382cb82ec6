"""The training loop's body: one global batch in, one optimizer step out.

Read `Trainer.step` first: it is the whole of training, top to bottom. Everything that differs between one process and
two thousand is inside the dispatcher, the optimizer's reductions and two all-reduces of statistics.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..checkpoint import store
from ..checkpoint.manifest import check_same_model, read_manifest
from ..configs.config import Config
from ..data.loader import Batch, Loader, evaluation_batches
from ..data.open import Data
from ..model.counts import flops_per_token
from ..model.router import update_bias
from ..model.transformer import LossWeights, Output
from ..parallel.executor import Program, Watch, microbatches_of
from ..parallel.groups import Groups
from ..parallel.schedule.actions import Schedule, forward_only
from ..parallel.schedule.timeline import Span
from ..plan.pipeline import make_schedule
from ..plan.steps import Progress, steps_from
from ..report.balance import measure_balance
from ..report.hardware import Peak, memory_gib
from ..report.metrics import StepMetrics, utilization
from .build import build_executor, build_model, build_optimizer, dp_rank
from .expert_balance import ExpertBalance
from .microbatches import micro_batches_on
from .non_finite import explain_non_finite
from .objective import loss_weights
from .totals import Totals, mean_losses, sum_outputs, sum_over_ranks, traffic_of_step

AVERAGE = "ema."
"""Prefix of the moving average's tensors in a checkpoint."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineRun:
    """One rank's part of a step: all micro-batches through the pipeline, forward and backward."""

    outputs: list[Output]
    """Losses and counts of every chunk of this rank for every micro-batch that it served."""
    schedule: Schedule
    program: Program
    spans: list[Span]
    """Begin and end of each action of the program, in seconds of `time.perf_counter`."""


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
        self._after_pause = True
        self._programs: dict[tuple[int, bool], tuple[Schedule, Program]] = {}
        self._flops = flops_per_token(config.model, config.batch.sequence_length)

    def step(self, trace: Callable[[PipelineRun], None] | None = None, watch: Watch | None = None) -> StepMetrics:
        """Train on the next global batch. Raises NonFiniteError, before any weight moves, if a number is not finite.

        `trace` is called with the pipeline's run. A GPU then finishes each action before the next, so that spans are
        exact. `watch`: see `Executor.train`.
        """
        started = time.perf_counter()
        config, before = self.config, self.progress
        self.experts.rebalance(before.step)
        micro_batches, sequences = self._next_batch()
        lr = config.optim.lr.at(before.tokens)
        speed = config.balance.bias_update_speed.at(before.tokens) if config.model.has_router_bias else 0.0
        weights = loss_weights(config, before, sequences)

        if trace is not None:
            self.optimizer.finish_gathers()  # so that the times are of the pipeline alone
        run = self.forward_backward(micro_batches, weights, timed=trace is not None, watch=watch)
        totals = self._totals(run.outputs)
        norm = self.optimizer.reduce_gradients()
        if not math.isfinite(norm) or not bool(totals.losses.isfinite().all()):  # equal on all ranks: all stop
            run_again = partial(self._gradients, micro_batches, weights)
            raise explain_non_finite(before.step + 1, self.model, self.groups, run_again)
        self.optimizer.step(lr, norm, blocking=not config.optim.overlap_gather)
        for layer, router in self.model.routers():
            if router.bias is not None:
                update_bias(router.bias, totals.counts[layer], speed)
        self.experts.measure(totals.counts, before.step + 1)
        self.progress = before.advanced(sequences, config.batch.sequence_length)
        if trace is not None:
            trace(run)
        return self._metrics(before, totals, norm, lr, speed, started)

    def forward_backward(
        self, batches: list[Batch], weights: LossWeights, timed: bool = False, watch: Watch | None = None
    ) -> PipelineRun:
        """Run all micro-batches of a step through the pipeline; their gradients go to the optimizer's FP32 sums.

        `timed` and `watch`: see `Executor.train`.
        """
        self._synchronise()
        self.model.recipe.monitor.clear()
        for chunk in self.model.chunks.values():
            chunk.train()
        schedule, program = self._program(len(batches))
        served = microbatches_of(schedule, program.rank)
        self.optimizer.begin_step(self.model.accumulations(served))
        micro_batches = micro_batches_on(self.device, batches, self.config, weights)
        outputs, spans = self.executor.train(program, micro_batches, timed, watch)
        return PipelineRun(outputs, schedule, program, spans)

    def _gradients(self, batches: list[Batch], weights: LossWeights, watch: Watch) -> Mapping[str, Tensor]:
        """Sums of the gradients on this rank by global name, of a step run with `watch`."""
        self.forward_backward(batches, weights, watch=watch)
        self.optimizer.reduce_gradients()  # completes the reductions that the last backward has begun
        return self.optimizer.gradients()

    def validate(self) -> dict[str, float]:
        """`validation_loss`, and `validation_loss_ema` of the averaged weights if there are any."""
        losses = {"validation_loss": self.evaluate()}
        if self.optimizer.ema is not None and self.config.train.evaluate_ema:
            with self.optimizer.averaged():
                losses["validation_loss_ema"] = self.evaluate()
        return losses

    def evaluate(self) -> float:
        """Mean next-token loss over the held-out sequences, in nats per token."""
        self._synchronise()
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
            outputs = self.executor.evaluate(program, micro_batches_on(self.device, batches, self.config))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for output in outputs:
            sums[0] += output.loss
        if self.groups.coordinates.pp == 0:  # every pipeline rank has the same sequences
            sums[1] = sum(int(batch.valid.sum()) for batch in batches) * self.config.batch.sequence_length
        self.groups.sum(sums)
        self._after_pause = True
        return float(sums[0] / sums[1])

    def _synchronise(self) -> None:
        """Bring the ranks that exchange tokens together after a pause in training, which may be of any length."""
        if self._after_pause:
            self.model.dispatcher.synchronise()
        self._after_pause = False

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this point into `folder`. Every rank calls it."""
        optimizer, self._after_pause = self.optimizer, True
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
        """Continue from checkpoint `path`, whatever layout wrote it; returns its progress record."""
        model = self.config.model.model_dump(mode="json")
        self._after_pause = True
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
        """Continue with the average of checkpoint `path`, over `updates` steps; None where it has no average."""
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

    def _program(self, num_microbatches: int, training: bool = True) -> tuple[Schedule, Program]:
        """The schedule of a step, or of its forwards alone, and this rank's part of it."""
        if (num_microbatches, training) not in self._programs:
            schedule = make_schedule(self.config, num_microbatches)
            if not training:
                schedule = forward_only(schedule)
            program = Program.of(schedule, self.groups.coordinates.pp, training)
            # A ramp passes through many sizes of the batch once, so only the last one is kept.
            self._programs = {key: kept for key, kept in self._programs.items() if key[1] != training}
            self._programs[num_microbatches, training] = schedule, program
        return self._programs[num_microbatches, training]

    def _state(self) -> dict[str, DTensor]:
        """All tensors of a checkpoint; filling them changes this trainer."""
        biases = {
            f"weights.{name}": DTensor.from_local(
                bias, self.groups.replicas("dp", holders), [Replicate()], run_check=False
            )
            for name, bias, holders in self.model.biases()
        }
        return {**self.optimizer.state(), **biases, **self.optimizer.averages()}

    def _totals(self, outputs: list[Output]) -> Totals:
        """Sums of the step over micro-batches, stages and ranks."""
        losses, counts = sum_outputs(outputs, self.config.model, self.device)
        self.model.recipe.monitor.spoil(losses)  # quantisation can turn an infinity of this step into a finite number
        return sum_over_ranks(losses, counts, self.groups)

    def _metrics(
        self, before: Progress, totals: Totals, norm: float, lr: float, speed: float, started: float
    ) -> StepMetrics:
        """Measurements of the step that began at time `started` with the progress `before`."""
        sequences = self.progress.sequences - before.sequences
        losses = mean_losses(totals, self.config.model, sequences, self.config.batch.sequence_length)
        balance = None
        if totals.counts.numel():
            nodes = [self.groups.layout.node(rank) for rank in next(self.groups.layout.ep_groups())]
            balance = measure_balance(totals.counts.cpu(), totals.dropped.cpu(), self.experts.rank_of_expert, nodes)
        seconds = time.perf_counter() - started  # read after the losses, which wait for the device
        rate, mfu = (self.progress.tokens - before.tokens) / seconds, None
        if self.peak is not None:
            mfu = utilization(rate, self._flops, self.groups.layout.world_size, self.peak.tflops)
        return StepMetrics(
            step=self.progress.step,
            tokens=self.progress.tokens,
            sequences=sequences,
            loss=losses.next_token,
            loss_mtp=losses.mtp,
            loss_balance=losses.balance,
            loss_device=losses.device,
            loss_communication=losses.communication,
            grad_norm=norm,
            lr=lr,
            bias_update_speed=speed,
            mtp_weight=self.config.train.mtp_weight.at(before.tokens),
            tokens_per_second=rate,
            mfu=mfu,
            layers=balance,
            memory_gib=memory_gib(self.device).peak,
            step_seconds=seconds,
            traffic=traffic_of_step(totals),
            **({} if balance is None else balance.summary()),
        )
