"""One step of one rank of any layout, on shapes alone.

`counterflow dryrun CONFIG --world N --rank R` runs the product's own code for one step of one rank: groups, model,
forward, backward, overlap, weight gradients, reductions and optimizer. Tensors lie on torch's `meta` device, which has
shapes and no values, and the process groups are torch's fake ones, which send nothing. The branch of the code that a
GPU takes is therefore taken here, for a rank of any layout, on one core and in a few gigabytes.

    counterflow dryrun deepseek-v3-671b --world 2048 --rank 896 --json rank896.json
    counterflow dryrun deepseek-v3-16b --world 64 --rank 0 --microbatches 8 --set memory.recompute=full

From Python: `dry_run(config, world=2048, rank=896, microbatches=40)` returns a `DryRun`, see `result.py`.
A dispatch mode (`recorder.py`) sees every operation. It keeps the books of bytes alive (`memory.py`), counts kernels,
bytes, FLOPs and host waits by phase (`operations.py`), and writes down every collective. What depends on values comes
from a stated routing of tokens (`routing.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..configs.config import Config
from ..data.open import Data
from ..fp8.te.library import STAND_INS
from ..parallel.executor import Program
from ..parallel.groups import Groups
from ..parallel.layout import Layout
from ..parallel.schedule.actions import Action, Overlap, parts
from ..plan.pipeline import example_schedule, make_schedule, make_split
from ..training.build import make_groups
from ..training.trainer import Trainer
from . import transformer_engine
from .extend import extend, fewest_microbatches
from .metering import RecordedMeter
from .recorder import Recorder, Work
from .result import DryRun, Layer
from .routing import RoutingName, TokenRouting

AT_ONCE = 1200
"""Layers times micro-batches that are run as they are, 30 to 50 ms each; longer steps are extended."""

GPUS_PER_NODE = 8
"""Value of `parallel.gpus_per_node: auto`, which only a machine could answer."""


def dry_run(
    config: Config,
    world: int,
    rank: int,
    microbatches: int | None = None,
    routing: RoutingName = "drawn",
    layer: bool = True,
    steps: int = 1,
) -> DryRun:
    """Run one step of `rank` of `world` ranks on shapes alone.

    Args:
        microbatches: of the step; by default those of the full global batch.
        layer: whether to count what one MoE layer does, by two more steps of small models.
        steps: number of steps; the last one is counted.

    Raises:
        UsageError: the layout or the schedule does not work.
    """
    started = time.perf_counter()
    layout = layout_of(config, world)
    if not 0 <= rank < world:
        raise AssertionError(f"no rank {rank} among {world}")
    step = _one_step(config, layout, microbatches)
    number = step.batch.microbatches(step.batch.global_sequences, layout.dp)
    per_layer = moe_layer(step, layout, routing) if layer and config.model.num_moe_layers else None
    counted = time.perf_counter()

    def run(microbatches: int) -> DryRun:
        began = time.perf_counter()
        config = _one_step(step, layout, microbatches)
        with _fake_world(world, rank):
            groups = make_groups(config, layout, "meta")
            run = _Step(config, groups, TokenRouting(routing, config, layout, rank), per_layer, steps=steps)
            return run.result({"groups": time.perf_counter() - began})

    fewest = fewest_microbatches(step, number)
    longer = fewest + 2 * layout.pp
    if number * _layers_of(step, layout, rank) <= AT_ONCE or longer >= number or steps > 1:
        result = run(number)
    else:
        result = extend(run(fewest), run(longer), number)
    return replace(result, seconds={"layer": counted - started, **result.seconds})


def _layers_of(config: Config, layout: Layout, rank: int) -> int:
    """Layers of the stages of `rank`, MTP modules included."""
    split, schedule = make_split(config), example_schedule(config)
    stages = schedule.stages_of_rank[layout.coordinates(rank).pp]
    depths = config.model.num_nextn_predict_layers if schedule.num_stages - 1 in stages else 0
    return depths + sum(len(split.layers[stage]) for stage in stages)


def layout_of(config: Config, world: int) -> Layout:
    """The layout of `world` ranks. Raises UsageError where the configuration has none."""
    asked = config.parallel
    per_node = GPUS_PER_NODE if asked.gpus_per_node == "auto" else asked.gpus_per_node
    return Layout.resolve(world, asked.pp, asked.ep, asked.dp, min(per_node, world))


def moe_layer(config: Config, layout: Layout, routing: RoutingName = "drawn") -> Layer:
    """Counts of one MoE layer and micro-batch: a model of two such layers less a model of one, on one pipeline rank.

    Counted is the second of three micro-batches: weights are quantised in the first, and reductions begin in the last.
    """
    counts = []
    for layers in (1, 2):
        small = _stack_of(config, layers)
        alone = Layout(layout.ep, 1, layout.ep, layout.gpus_per_node)
        with _fake_world(layout.ep, 0):
            groups = make_groups(small, alone, "meta")
            step = _Step(small, groups, TokenRouting(routing, small, alone, 0), None, only=1)
            step.run()
            counts.append(step.total())
    one, two = counts

    def less(more: Counter[str], fewer: Counter[str]) -> dict[str, float]:
        return {name: more[name] - fewer[name] for name in more if more[name] != fewer[name]}

    return Layer(
        less(two.kernels, one.kernels), less(two.bytes, one.bytes), two.flops - one.flops, less(two.waits, one.waits)
    )


class _Step:
    """One step of the trainer under a recorder. With `only`, labels of other micro-batches differ from its own."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        routing: TokenRouting,
        layer: Layer | None,
        only: int | None = None,
        steps: int = 1,
    ) -> None:
        self.config, self.routing, self.layer, self.only, self.steps = config, routing, layer, only, steps
        self.recorder = Recorder()
        self.meter = RecordedMeter(groups.meter.node_of, self.recorder.purposes)
        self.groups = replace(groups, meter=self.meter)
        self.microbatches = config.batch.microbatches(config.batch.global_sequences, groups.layout.dp)
        self.program = Program.of(make_schedule(config, self.microbatches), groups.coordinates.pp)
        self.after_actions: list[tuple[str, int]] = []
        self.times = [time.perf_counter()]

    def run(self) -> Trainer:
        """Build the rank and run the step."""
        recorder = self.recorder
        with recorder:
            recorder.label = "other state"
            trainer = Trainer(self.config, self.groups, torch.device("meta"), cast(Data, _NoData(self.config)))
            dispatcher = trainer.model.dispatcher
            dispatcher.read_counts = self.routing.reader(dispatcher)  # type: ignore[assignment, method-assign]
            ends = self.routing.ends(dispatcher.options.alignment)
            recorder.known[ends.shape, ends.dtype] = ends
            _name_state(recorder, trainer)
            self.built = recorder.memory.alive
            self.times.append(time.perf_counter())
            for _ in range(1, self.steps):
                trainer.step()
            recorder.restart()
            self.meter.restart()
            recorder.label = "begin"
            trainer.step(watch=_Watch(self))
            self.times.append(time.perf_counter())
        return trainer

    def total(self) -> Work:
        """Sum of everything that ran in the actions of the pipeline, of the micro-batch `only` where there is one."""
        total = Work()
        for label, work in self.recorder.work.items():
            if label == "W" or label.startswith(("F.", "B.")):
                total.kernels.update(work.kernels)
                total.bytes.update(work.bytes)
                total.waits.update(work.waits)
                total.flops += work.flops
        return total

    def result(self, seconds: dict[str, float]) -> DryRun:
        trainer = self.run()
        recorder, config, groups = self.recorder, self.config, self.groups
        built, stepped = (self.times[i + 1] - self.times[i] for i in range(2))
        return DryRun(
            config=config.run.name,
            layout=f"pp {groups.layout.pp} x edp {groups.layout.edp} x ep {groups.layout.ep}",
            rank=groups.rank,
            coordinates=groups.coordinates,
            microbatches=self.microbatches,
            run_microbatches=self.microbatches,
            in_flight=self.program.peak_microbatches,
            parameters=sum(parameter.numel() for _, parameter in trainer.model.parameters()),
            routing=self.routing.name,
            load=self.routing.load,
            peak_bytes=recorder.memory.peak,
            peak_label=recorder.memory.peak_label,
            at_peak=recorder.memory.at_peak,
            built_bytes=self.built,
            after_actions=self.after_actions,
            work=dict(recorder.work),
            layer=self.layer,
            traffic=self.meter.by_group,
            sent=recorder.sent,
            communicators=recorder.communicators,
            program=recorder.program,
            operations=frozenset(recorder.used),
            mixed=dict(recorder.mixed),
            seconds={**seconds, "build": built, "step": stepped},
        )


def _name_state(recorder: Recorder, trainer: Trainer) -> None:
    """Label what is alive between two steps by its use."""
    optimizer = trainer.optimizer
    for _, parameter in trainer.model.parameters():
        recorder.memory.relabel(parameter, "weights")
        recorder.memory.relabel(optimizer.gradient_buffer(parameter), "sums of gradients")
        master, *moments = optimizer.shards(parameter)
        recorder.memory.relabel(master, "master weights")
        for moment in moments:
            recorder.memory.relabel(moment, "moments")


class _Watch:
    """Labels for the recorder from the executor, and the bytes alive after each action."""

    def __init__(self, step: _Step) -> None:
        self._step = step
        self._left = len(step.program.actions)
        self._recorder = step.recorder
        self._aside = ""

    def begin(self, action: Action | Overlap) -> None:
        only = self._step.only
        self._aside = "" if only is None or any(part.microbatch == only for part in parts(action)) else "aside "
        self._recorder.label = f"{self._aside}W"

    def end(self, action: Action | Overlap) -> None:
        self._step.after_actions.append((str(action), self._recorder.memory.alive))
        self._left -= 1
        self._recorder.label = "transfers" if self._left else "update"

    def phase(self, side: str, name: str | None) -> None:
        self._recorder.label = self._aside + ("W" if name is None else f"{side}.{name}")


class _NoData:
    """Data of a dry run: samples of zeros."""

    digest = ""

    def __init__(self, config: Config) -> None:
        self.train = self
        self.width = config.batch.sequence_length + 1 + config.model.num_nextn_predict_layers

    def sample(self, index: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
        return out


def _one_step(config: Config, layout: Layout, microbatches: int | None) -> Config:
    """The configuration of a step of the full batch, or of so many micro-batches."""
    batch = config.batch
    if microbatches is not None:
        batch = batch.model_copy(update={"global_sequences": microbatches * layout.dp * batch.micro_sequences})
    batch = batch.model_copy(update={"ramp": None})
    batch.microbatches(batch.global_sequences, layout.dp)
    data = config.data.model_copy(update={"prefetch": 0})
    return config.model_copy(update={"batch": batch, "data": data})


def _stack_of(config: Config, layers: int) -> Config:
    """A model of some MoE layers on one pipeline rank, for a step of three micro-batches."""
    model = config.model.model_copy(
        update={"num_hidden_layers": layers, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    )
    parallel = config.parallel.model_copy(
        update={"pp": 1, "dp": "auto", "schedule": "1f1b", "schedule_options": {}, "split": "balanced"}
    )
    sequences = 3 * config.batch.micro_sequences * config.parallel.ep
    batch = config.batch.model_copy(update={"global_sequences": sequences})
    return config.model_copy(update={"model": model, "parallel": parallel, "batch": batch})


@contextmanager
def _fake_world(world: int, rank: int) -> Iterator[None]:
    """Context in which this process is one rank of torch's fake process group, and GPUs have Transformer Engine."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world, timeout=timedelta(seconds=60))
    STAND_INS["meta"] = transformer_engine.library()
    try:
        yield
    finally:
        del STAND_INS["meta"]
        dist.destroy_process_group()
