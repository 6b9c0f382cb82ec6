"""Small grids of ranks that stand for large ones, and few micro-batches that stand for many. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..configs.config import Config
from ..parallel.schedule.actions import Overlap, Schedule
from ..parallel.schedule.choose import generate, schedule_name
from ..settings import UsageError

MOST_RANKS = 8
"""Largest number of processes where `--nproc` gives none."""

STEADY = 3
"""Micro-batches per pipeline rank with which every schedule reaches its steady state."""


class Grid(NamedTuple):
    """Ranks along each axis. `edp` is None where it follows from the number of processes."""

    pp: int
    ep: int
    edp: int | None

    @property
    def ranks(self) -> int:
        return self.pp * self.ep * (self.edp or 1)


def grid_of(config: Config) -> Grid:
    """The grid that a configuration describes."""
    parallel = config.parallel
    return Grid(parallel.pp, parallel.ep, None if parallel.dp == "auto" else parallel.dp // parallel.ep)


@dataclass(frozen=True)
class Pipeline:
    """A schedule by name, for some number of ranks."""

    name: str
    ranks: int
    options: dict[str, Any]

    def schedule(self, wanted: int) -> Schedule | None:
        """Return it with `wanted` micro-batches or the next larger number that works; None where none works."""
        for count in range(wanted, wanted + 4 * self.ranks + 1):
            try:
                return generate(self.name, self.ranks, count, self.options)
            except UsageError:
                continue
        return None


def pipeline_of(config: Config, ranks: int) -> Pipeline:
    """The configured schedule on `ranks` pipeline ranks; on one rank there is nothing to schedule."""
    parallel = config.parallel
    if ranks == 1 < parallel.pp:
        return Pipeline(schedule_name("auto", 1), 1, {})
    return Pipeline(schedule_name(parallel.schedule, parallel.pp), ranks, dict(parallel.schedule_options))


@dataclass(frozen=True)
class Structure:
    """Properties of a schedule that do not depend on its size."""

    forms: frozenset[str]
    """Kinds of its actions, alone and in pairs: `F`, `F+B`."""
    stages_per_rank: frozenset[int]
    middle: bool
    """Whether a stage lies between the first and the last."""

    @classmethod
    def of(cls, schedule: Schedule) -> Structure:
        forms = {
            f"F+{action.backward.kind}" if isinstance(action, Overlap) else action.kind
            for actions in schedule.actions
            for action in actions
        }
        return cls(frozenset(forms), frozenset(map(len, schedule.stages_of_rank)), schedule.num_stages > 2)


def choose_grid(config: Config, nproc: int | None) -> Grid:
    """The grid for at most `nproc` processes, or for as few as show the topology if `nproc` is None (8 at most).

    In this order the grid keeps: all axes above 1; pp rather than ep rather than edp; all forms of actions of the
    schedule and its stages per rank; a stage in the middle. With `nproc` given, the result is the largest such grid.
    Where dp is auto, experts get two replicas if there is room.
    """
    most = MOST_RANKS if nproc is None else nproc
    configured = grid_of(config)
    whole = pipeline_of(config, configured.pp).schedule(STEADY * configured.pp)
    assert whole is not None, "the configuration was checked"
    wanted = Structure.of(whole)

    def kept(grid: Grid) -> tuple[Any, ...]:
        axes = [(size or 2) == 1 or (here or 1) > 1 for size, here in zip(configured, grid, strict=True)]
        schedule = pipeline_of(config, grid.pp).schedule(STEADY * grid.pp)
        assert schedule is not None
        found = Structure.of(schedule)
        same = found.forms == wanted.forms and found.stages_per_rank == wanted.stages_per_rank
        return sum(axes), axes, same, found.middle == wanted.middle

    grids = list(_grids(config, configured, most))
    best = max(map(kept, grids))
    candidates = [grid for grid in grids if kept(grid) == best]
    if nproc is None:
        return min(candidates, key=lambda grid: (grid.ranks, -grid.pp, -grid.ep))
    return max(candidates, key=lambda grid: (grid.ranks, grid.pp, grid.ep))


def missing(config: Config, grid: Grid) -> list[str]:
    """Properties of the configured topology that `grid` has no room for, in words."""
    configured = grid_of(config)
    names = ("pp", "ep", "edp")
    lost = [
        f"{name} {size or 'auto'} is 1 here"
        for name, size, here in zip(names, configured, grid, strict=True)
        if (size or 2) > 1 and (here or 1) == 1
    ]
    if grid.pp == 1:
        return lost
    wanted, found = (pipeline_of(config, ranks).schedule(STEADY * ranks) for ranks in (configured.pp, grid.pp))
    assert wanted is not None and found is not None
    gone = Structure.of(wanted).forms - Structure.of(found).forms
    lost += [f"the schedule has no {' or '.join(sorted(gone))} here"] if gone else []
    lost += ["no stage lies between the first and the last"] if wanted.num_stages > 2 >= found.num_stages else []
    return lost


def choose_microbatches(config: Config, grid: Grid) -> dict[str, int]:
    """Micro-batches of a pipeline, `global_sequences` for the full batch and `ramp.start` for a ramp's first.

    Each pipeline rank gets as many as in the configuration, up to the number that reaches the schedule's steady state.
    """
    configured, batch = grid_of(config), config.batch
    pipeline = pipeline_of(config, grid.pp)
    counts = {}
    for name, sequences in config.batch.sizes().items():
        if name == "ramp.increment":
            continue
        given = STEADY * configured.pp  # with dp auto any number is possible
        if configured.edp is not None:
            given = sequences // (configured.ep * configured.edp * batch.micro_sequences)
        wanted = max(1, round(min(float(STEADY), given / configured.pp) * grid.pp))
        schedule = pipeline.schedule(wanted)
        assert schedule is not None, (pipeline, wanted)
        counts[name] = schedule.num_microbatches
    return counts


def _grids(config: Config, configured: Grid, most: int) -> Iterator[Grid]:
    """Every smaller grid of up to `most` ranks that the schedule runs on; an axis of 1 stays."""
    for pp in range(1, min(configured.pp, most) + 1):
        if pipeline_of(config, pp).schedule(STEADY * pp) is None:
            continue
        for ep in (ep for ep in range(1, min(configured.ep, most // pp) + 1) if configured.ep % ep == 0):
            room = most // (pp * ep)
            yield from (Grid(pp, ep, edp) for edp in range(1, min(configured.edp or room, room) + 1))
