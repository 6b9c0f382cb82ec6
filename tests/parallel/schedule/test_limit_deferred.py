"""A schedule's deferred W, limited by the memory that they hold: what is held, what moves and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule, parts
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.limit_deferred import forwards_in_flight, limit_deferred
from counterflow.parallel.schedule.simulate import simulate
from counterflow.tests.parallel.schedule.cases import examples, schedules


def held(schedule: Schedule, ratios: Sequence[float]) -> list[list[tuple[float, int]]]:
    """Memory during and after each action of each rank, in forwards, and the W deferred after it. Counted from sets of
    (stage, micro-batch), unlike in the product."""
    ranks = []
    for actions in schedule.actions:
        in_flight: set[tuple[int, int]] = set()
        waiting: set[tuple[int, int]] = set()
        seen = []
        for action in actions:
            in_flight |= {part[1:] for part in parts(action) if part.kind == "F"}
            before = len(in_flight) + sum(ratios[stage] for stage, _ in waiting)
            in_flight -= {part[1:] for part in parts(action) if part.kind in "BI"}
            waiting |= {part[1:] for part in parts(action) if part.kind == "I"}
            waiting -= {part[1:] for part in parts(action) if part.kind == "W"}
            after = len(in_flight) + sum(ratios[stage] for stage, _ in waiting)
            seen.append((max(before, after), len(waiting)))
        ranks.append(seen)
    return ranks


def is_w(action: Action | Overlap) -> bool:
    return isinstance(action, Action) and action.kind == "W"


def others_before(actions: Sequence[Action | Overlap], w: Action | Overlap) -> int:
    """Number of actions before `w` that are no W."""
    return sum(not is_w(action) for action in actions[: actions.index(w)])


def others(schedule: Schedule) -> Schedule:
    """The schedule without its W."""
    kept = (tuple(action for action in actions if not is_w(action)) for actions in schedule.actions)
    return replace(schedule, actions=tuple(kept))


@examples(120)
@given(schedule=schedules(), ratio=st.sampled_from([0.5, 1.0, 1.7, 2.2, 3.0, 20.0]), least=st.integers(1, 4))
def test_what_is_held_stays_within_the_budget_and_only_w_move_forward(
    schedule: Schedule, ratio: float, least: int
) -> None:
    budget = forwards_in_flight(schedule)
    ratios = [ratio + stage / 64 for stage in range(schedule.num_stages)]
    limited = limit_deferred(schedule, ratios, budget, least)
    check(limited)
    assert others(limited) == others(schedule)
    for memory in held(limited, ratios):
        for (before, waiting), (largest, deferred) in zip([(0.0, 0), *memory], memory, strict=False):
            assert largest <= budget + 1e-9 or max(deferred, waiting) <= least or before > budget
    for old, new in zip(schedule.actions, limited.actions, strict=True):
        later = [others_before(new, action) - others_before(old, action) for action in old if is_w(action)]
        assert all(moved <= 0 for moved in later)


@examples(60)
@given(schedule=schedules(), most=st.integers(1, 5))
def test_at_most_as_many_as_asked_are_deferred(schedule: Schedule, most: int) -> None:
    limited = limit_deferred(schedule, [9.0] * schedule.num_stages, inf, most=most)
    check(limited)
    if max(deferred for memory in held(schedule, [1.0] * schedule.num_stages) for _, deferred in memory) <= most:
        assert limited is schedule
    assert all(deferred <= most for memory in held(limited, [1.0] * schedule.num_stages) for _, deferred in memory)


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_dualpipes_published_order_stays_where_a_w_holds_two_forwards(ranks: int) -> None:
    for microbatches in (2 * ranks, 120):
        schedule = find_schedule("dualpipe")(ranks, microbatches)
        assert forwards_in_flight(schedule) == ranks + 1
        assert limit_deferred(schedule, [2.0] * ranks, ranks + 1) == schedule
        assert limit_deferred(schedule, [2.6] * ranks, ranks + 1) != schedule


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_no_ratio_costs_a_long_step_more_than_a_percent(name: str, ranks: int) -> None:
    schedule = find_schedule(name)(ranks, 120)
    costs = Costs.uniform(schedule.num_stages, 10, 10, 10, 25)
    for ratio in (1.0, 2.0, 2.5, 4.0, 100.0):
        budget = forwards_in_flight(schedule)
        limited = limit_deferred(schedule, [ratio] * schedule.num_stages, budget, least=budget // 4)
        assert simulate(limited, costs).step_time <= 1.01 * simulate(schedule, costs).step_time


def test_a_schedule_that_defers_nothing_is_returned_as_it_is() -> None:
    for name in ("gpipe", "1f1b", "interleaved"):
        schedule = find_schedule(name)(4, 8)
        assert limit_deferred(schedule, [3.0] * schedule.num_stages, 1.0) is schedule
