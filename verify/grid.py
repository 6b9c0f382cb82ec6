"""Which small grid of ranks stands for a large one, and how many micro-batches for many. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..configs.config import Config
from ..parallel.schedule.actions import Overlap, Schedule
from ..parallel.schedule.choose import generate, schedule_name
from ..settings import UsageError

MOST_RANKS = 8
"""Processes that are started where `--nproc` does not say how many."""

STEADY = 3
"""Micro-batches of a rank of the pipeline that are enough for every schedule to reach its steady state."""


class Grid(NamedTuple):
    """Ranks along each axis. `edp` is None where the world decides."""

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
        """With `wanted` micro-batches, or the next larger number that it takes; None where it refuses all."""
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
    """What a schedule asks of those who run it, whatever its size."""

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
        return cls(frozenset(forms), frozenset(map(len, schedule.placement)), schedule.num_stages > 2)


def choose_grid(config: Config, nproc: int | None) -> Grid:
    """The grid for at most `nproc` processes, or for as few as show the topology if it is None (8 at most).

    In this order it keeps: every axis above 1 that is; pp rather than ep rather than edp; every form of action of the
    schedule and its stages a rank; a stage in the middle. With `nproc` given it is then the largest. Where dp is auto,
    experts get two replicas if there is room.
    """
    most = MOST_RANKS if nproc is None else nproc
    yours = grid_of(config)
    whole = pipeline_of(config, yours.pp).schedule(STEADY * yours.pp)
    assert whole is not None, "the configuration was checked"
    aim = Structure.of(whole)

    def kept(grid: Grid) -> tuple[Any, ...]:
        axes = [(mine or 2) == 1 or (here or 1) > 1 for mine, here in zip(yours, grid, strict=True)]
        schedule = pipeline_of(config, grid.pp).schedule(STEADY * grid.pp)
        assert schedule is not None
        found = Structure.of(schedule)
        same = found.forms == aim.forms and found.stages_per_rank == aim.stages_per_rank
        return sum(axes), axes, same, found.middle == aim.middle

    grids = list(_grids(config, yours, most))
    best = max(map(kept, grids))
    candidates = [grid for grid in grids if kept(grid) == best]
    if nproc is None:
        return min(candidates, key=lambda grid: (grid.ranks, -grid.pp, -grid.ep))
    return max(candidates, key=lambda grid: (grid.ranks, grid.pp, grid.ep))


def missing(config: Config, grid: Grid) -> list[str]:
    """In words, what of the configured topology `grid` has no room for."""
    yours = grid_of(config)
    names = ("pp", "ep", "edp")
    lost = [
        f"{name} {mine or 'auto'} is 1 here"
        for name, mine, here in zip(names, yours, grid, strict=True)
        if (mine or 2) > 1 and (here or 1) == 1
    ]
    if grid.pp == 1:
        return lost
    aim, found = (pipeline_of(config, ranks).schedule(STEADY * ranks) for ranks in (yours.pp, grid.pp))
    assert aim is not None and found is not None
    gone = Structure.of(aim).forms - Structure.of(found).forms
    lost += [f"the schedule has no {' or '.join(sorted(gone))} here"] if gone else []
    lost += ["no stage lies between the first and the last"] if aim.num_stages > 2 >= found.num_stages else []
    return lost


def choose_microbatches(config: Config, grid: Grid) -> dict[str, int]:
    """Micro-batches of a pipeline, `global_sequences` for the full batch and `ramp.start` for a ramp's first.

    As many for each pipeline rank as the configuration has, up to what reaches the steady state of the schedule.
    """
    yours, batch = grid_of(config), config.batch
    pipeline = pipeline_of(config, grid.pp)
    counts = {}
    for name, sequences in config.batch.sizes().items():
        if name == "ramp.increment":
            continue
        given = STEADY * yours.pp  # with dp auto any number is possible
        if yours.edp is not None:
            given = sequences // (yours.ep * yours.edp * batch.micro_sequences)
        wanted = max(1, round(min(float(STEADY), given / yours.pp) * grid.pp))
        schedule = pipeline.schedule(wanted)
        assert schedule is not None, (pipeline, wanted)
        counts[name] = schedule.num_microbatches
    return counts


def _grids(config: Config, yours: Grid, most: int) -> Iterator[Grid]:
    """Every smaller grid of up to `most` ranks that the schedule runs on; an axis of 1 stays."""
    for pp in range(1, min(yours.pp, most) + 1):
        if pipeline_of(config, pp).schedule(STEADY * pp) is None:
            continue
        for ep in (ep for ep in range(1, min(yours.ep, most // pp) + 1) if yours.ep % ep == 0):
            room = most // (pp * ep)
            yield from (Grid(pp, ep, edp) for edp in range(1, min(yours.edp or room, room) + 1))
