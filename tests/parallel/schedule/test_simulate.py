"""Simulated steps: the least times that costs and order allow, computed in linear time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.settings import UsageError
from counterflow.tests.parallel.schedule.cases import costs, ends_by_relaxation, examples, schedules


@examples(80)
@given(schedule=schedules(ranks=5, microbatches=10), data=st.data())
def test_times_are_the_least_that_respect_order_data_and_channels(schedule: Schedule, data: st.DataObject) -> None:
    given_costs = data.draw(costs(schedule.num_stages))
    timeline = simulate(schedule, given_costs)
    ends = {
        (rank, position): span.end for rank, spans in enumerate(timeline.spans) for position, span in enumerate(spans)
    }
    assert ends == pytest.approx(ends_by_relaxation(schedule, given_costs))
    for spans, actions in zip(timeline.spans, schedule.actions, strict=True):
        assert tuple(span.action for span in spans) == actions
        assert [s.end - s.start for s in spans] == pytest.approx([given_costs.duration(a) for a in actions])
    assert timeline.peak_microbatches == check(schedule).peak


def test_transfers_queue_on_their_channel_and_then_travel() -> None:
    """Three forwards of 1 s on rank 0; each transfer occupies the channel for 4 s and then takes 1 s."""
    orders = (
        tuple(Action("F", 0, m) for m in range(3)) + tuple(Action("B", 0, m) for m in range(3)),
        tuple(Action(kind, 1, m) for m in range(3) for kind in "FB"),  # type: ignore[arg-type]
    )
    schedule = Schedule("test", 2, 2, 3, ((0,), (1,)), orders)
    one = (1.0, 1.0)
    timeline = simulate(schedule, Costs(one, one, one, (0.0, 0.0), 1.0, 8.0, 2.0))
    starts = [[span.start for span in spans] for spans in timeline.spans]
    # Activations leave the channel at 5, 9 and 13; gradients, ready at 9, 13 and 17, at 13, 17 and 21.
    assert starts == [[0, 1, 2, 14, 18, 22], [6, 7, 10, 11, 14, 15]]
    assert timeline.step_time == 24
    assert timeline.bubble == (24 - 9, 24 - 9)


def test_p2p_latency_alone_delays_every_hop() -> None:
    schedule = find_schedule("1f1b")(4, 1)
    assert simulate(schedule, Costs.uniform(4, 10, 10, 10, p2p=3)).step_time == 4 * 30 + 2 * 3 * 3
    within = find_schedule("dualpipev")(1, 1)
    assert simulate(within, Costs.uniform(2, 10, 10, 10, p2p=3)).step_time == 60


def test_a_pair_saves_the_hidden_time_of_its_stages() -> None:
    pair = Overlap(Action("F", 0, 1), Action("B", 1, 0))
    assert Costs.uniform(2, 10, 10, 10, overlapped=25).duration(pair) == 25
    uneven = Costs((10, 20), (11, 21), (12, 22), (4, 8))
    assert uneven.duration(pair) == 10 + 21 + 22 - (4 + 8) / 2
    deferred = pair._replace(backward=Action("I", 1, 0))
    assert uneven.duration(deferred) == 10 + 21 - 6
    assert Costs.uniform(2, 10, 10, 10, overlapped=12).duration(deferred) == 10  # no shorter than its longer half


def test_timeline_has_the_share_of_the_ranks_time_that_is_bubble() -> None:
    timeline = simulate(find_schedule("gpipe")(2, 1), Costs.uniform(2))
    assert (timeline.step_time, timeline.bubble, timeline.bubble_fraction) == (6, (3, 3), 0.5)
    assert timeline.to_json() == {
        "step_time": 6,
        "bubble": [3, 3],
        "bubble_fraction": 0.5,
        "peak_microbatches": [1, 1],
        "parameter_copies": 1,
    }
    assert simulate(find_schedule("dualpipe")(2, 4), Costs.uniform(2)).parameter_copies == 2


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(UsageError, match=r"costs\.forward has 4 stages, but schedule dualpipev for 4 ranks has 8"):
        simulate(find_schedule("dualpipev")(4, 8), Costs.uniform(4))


def lines_run(work: Callable[[], object]) -> int:
    """Number of Python lines that `work` executes: a measure of time that does not depend on the machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("options", [{}, {"defer_weights": True}])
def test_generating_checking_and_simulating_are_linear(options: dict[str, bool]) -> None:
    def lines_an_action(ranks: int, microbatches: int) -> float:
        made: list[Schedule] = []

        def work() -> None:
            made.append(find_schedule("dualpipe")(ranks, microbatches, **options))
            check(made[0])
            simulate(made[0], Costs.uniform(ranks, 1, 1, 1, 2.5))

        return lines_run(work) / len(list(made[0].work()))

    few = lines_an_action(4, 32)
    assert lines_an_action(4, 128) < 1.05 * few
    # With fewer ranks a larger share is at an end, where less is sent. Quadratic work would give 4.
    assert lines_an_action(16, 32) < 1.25 * few
