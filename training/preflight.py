"""Checks of a run before a process is started or a file is written.

Each check raises UsageError with the numbers that clash and with a remedy; all failures are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Literal, TypeVar

from ..checkpoint.manifest import Manifest, check_same_model, complete_steps, read_manifest
from ..configs.clashes import gpu_width_clashes
from ..configs.config import Config
from ..data.open import Data, open_data
from ..data.tokenizer import ByteTokenizer
from ..parallel.layout import Layout
from ..parallel.schedule.choose import generate
from ..parallel.schedule.simulate import simulate
from ..plan.costs import stage_costs
from ..plan.pipeline import make_schedule, make_split
from ..plan.steps import Progress, total_steps
from ..settings import UsageError
from .backend import backend_faults
from .dispatch import dispatch_faults, routing_notes
from .schedules import distinct_forms, sizes_of_run

T = TypeVar("T")

MUCH_BUBBLE = 0.2
"""Share of a step that pipeline ranks may be idle without a note."""

MORE_BUBBLE = 0.05
"""Additional share of idle time, compared with the full batch, that the start of a ramp may have without a note."""


@dataclass(frozen=True)
class RunPlan:
    """A run that can start: its layout, its folder and the checkpoint that it continues from.

    `notes` are sentences for the user on settings that work less well than others would.
    """

    config: Config
    layout: Layout
    run_dir: Path
    total_steps: int
    data: Data
    checkpoint: Path | None
    progress: Progress
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.total_steps


def prepare_run(
    config: Config,
    world_size: int,
    ranks_per_node: int,
    cache: Path,
    fresh: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
) -> RunPlan:
    """Check a run on `world_size` ranks.

    Args:
        cache: folder for tokenised text where `data.cache_dir` is null.
        fresh: whether an existing run folder will be moved aside.
        device: kind of device that the ranks will compute on.
    """
    faults: list[str] = []
    layout = _collect(faults, lambda: _layout(config, world_size, ranks_per_node))
    if layout is not None:
        batch_faults = [f"batch.{name} {fault}" for name, fault in config.batch.faults(layout.dp).items()]
        faults += batch_faults or _schedule_faults(config, layout)
    faults += _vocabulary_faults(config)
    faults += backend_faults(config, device)
    if device == "cuda" and config.run.device != "cuda":  # with cuda the configuration would not have loaded
        faults += [f"{keys[0]} {message}" for keys, message in gpu_width_clashes(config.model, config.precision)]
    faults += dispatch_faults(config, layout) if layout is not None else []
    data = _collect(faults, lambda: _open_data(config, cache))
    run_dir = Path(config.run.dir).expanduser() / config.run.name
    faults += _folder_faults(run_dir)
    found = None if fresh else _collect(faults, lambda: _latest_checkpoint(config, run_dir))
    if faults:
        raise UsageError(faults[0] if len(faults) == 1 else _list("this run cannot start:", faults))
    assert layout is not None and data is not None
    checkpoint, progress = found if found is not None else (None, Progress())
    notes = (
        *bubble_notes(config, layout),
        *routing_notes(config, layout),
        *placement_notes(config, layout),
        *config.optim.notes(),
    )
    return RunPlan(config, layout, run_dir, total_steps(config), data, checkpoint, progress, notes)


def _open_data(config: Config, cache: Path) -> Data:
    extra = 1 + config.model.num_nextn_predict_layers
    if config.data.cache_dir is not None:
        cache = Path(config.data.cache_dir).expanduser()
    return open_data(config.data, config.batch.sequence_length, extra, config.run.seed, cache)


def _list(heading: str, faults: list[str]) -> str:
    return "\n".join([heading, *(indent(fault, "  ") for fault in faults)])


def _collect(faults: list[str], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except UsageError as error:
        faults.append(str(error))
        return None


def _layout(config: Config, world_size: int, ranks_per_node: int) -> Layout:
    asked = config.parallel
    per_node = ranks_per_node if asked.gpus_per_node == "auto" else asked.gpus_per_node
    try:
        return Layout.resolve(world_size, asked.pp, asked.ep, asked.dp, per_node)
    except UsageError as error:
        # With one process the usual mistake is a missing --nproc, so mention it.
        raise UsageError(f"{error} (--nproc N starts N ranks)" if world_size == 1 else str(error)) from None


def _schedule_faults(config: Config, layout: Layout) -> list[str]:
    """Numbers of micro-batches that the schedule does not work with, among those of `distinct_forms`."""
    counts = {config.batch.microbatches(size, layout.dp): size for size in sizes_of_run(config)}
    parallel, ends = config.parallel, (min(counts), max(counts))
    for count in distinct_forms(counts, layout.pp):
        try:
            if count in ends:
                make_schedule(config, count)
            else:  # checking every one would take seconds
                generate(parallel.schedule, parallel.pp, count, parallel.schedule_options)
        except UsageError as error:
            return [f"a global batch of {counts[count]} sequences is {count} micro-batches a pipeline: {error}"]
    return []


def bubble_notes(config: Config, layout: Layout) -> tuple[str, ...]:
    """Notes on the idle time from few micro-batches, simulated with predicted costs; empty where it is short."""
    sizes = sizes_of_run(config)
    fewest, most = (config.batch.microbatches(size, layout.dp) for size in (sizes[0], sizes[-1]))
    costs = stage_costs(config, make_split(config))
    if fewest >= 8 * len(costs.forward):  # with so many, only the split matters
        return ()

    def idle(count: int) -> float:
        return simulate(make_schedule(config, count), costs).bubble_fraction

    at_first = idle(fewest)
    so_few = f"{fewest} micro-batches for {layout.pp} pipeline ranks leave them idle for {at_first:.0%} of a step"
    if fewest < most and at_first > (full := idle(most)) + MORE_BUBBLE:
        return (f"the batch ramp starts small: {so_few}, the {most} of the full batch for {full:.0%} (simulated)",)
    if fewest == most and at_first > MUCH_BUBBLE:
        return (f"{so_few} (simulated); more micro-batches, smaller ones or of a larger global batch, leave less",)
    return ()


def placement_notes(config: Config, layout: Layout) -> tuple[str, ...]:
    """Notes on the limits of moving experts in this layout."""
    every = config.parallel.expert_placement.every
    if every is None:
        return ()
    if layout.ep == 1:
        return (f"parallel.expert_placement.every {every} moves nothing: with parallel.ep 1 a rank holds all experts",)
    if layout.ep % layout.gpus_per_node and layout.gpus_per_node % layout.ep:
        return (
            f"parallel.expert_placement does not keep groups on nodes: groups of {layout.ep} ranks lie unevenly on "
            f"nodes of {layout.gpus_per_node}",
        )
    return ()


def _folder_faults(run_dir: Path) -> list[str]:
    """Reasons why the run folder cannot be made or written to."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"run.dir cannot hold this run: {existing} is a file"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"run.dir cannot hold this run: nothing may be written in {existing}"]
    return []


def _vocabulary_faults(config: Config) -> list[str]:
    needed, given = ByteTokenizer().vocab_size, config.model.vocab_size
    if given >= needed:
        return []
    return [f"model.vocab_size is {given}, but data.tokenizer {config.data.tokenizer} has {needed} tokens"]


def _latest_checkpoint(config: Config, run_dir: Path) -> tuple[Path, Progress] | None:
    steps = complete_steps(run_dir / "checkpoints")
    if not steps:
        return None
    path = steps[max(steps)]
    manifest: Manifest = read_manifest(path)
    check_same_model(manifest, config.model.model_dump(mode="json"), path)
    return path, Progress(**{key: manifest.progress[key] for key in ("step", "tokens", "sequences")})
