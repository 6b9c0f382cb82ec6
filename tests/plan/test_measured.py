"""Costs from a timeline, which must equal the costs of its simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from counterflow.parallel.schedule.actions import Overlap
from counterflow.parallel.schedule.catalogue import find_schedule, schedule_names
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.plan.measured import measured_costs


@pytest.mark.parametrize("name", schedule_names())
def test_simulating_with_the_measured_costs_gives_the_measured_step(name: str) -> None:
    schedule = find_schedule(name)(4, 12)
    costs = Costs.uniform(schedule.num_stages, 3.0, 4.0, 2.0, 6.5)
    timeline = simulate(schedule, costs)
    repeated = simulate(schedule, measured_costs(timeline))
    assert repeated.step_time == pytest.approx(timeline.step_time, rel=1e-9)
    for one, other in zip(repeated.spans, timeline.spans, strict=True):
        assert [span.start for span in one] == pytest.approx([span.start for span in other], abs=1e-9)


def test_stages_keep_their_own_costs() -> None:
    schedule = find_schedule("zb1p")(3, 8)
    costs = Costs((1.0, 2.0, 3.0), (2.0, 1.0, 5.0), (0.5, 0.25, 4.0), (0.0,) * 3)
    found = measured_costs(simulate(schedule, costs))
    assert found.forward == pytest.approx(costs.forward)
    assert found.backward_input == pytest.approx(costs.backward_input)
    assert found.backward_weight == pytest.approx(costs.backward_weight)


def test_a_pair_saves_no_more_than_its_shorter_half() -> None:
    """Pairs would seem to take no time if another program slowed down the actions that ran alone."""
    schedule = find_schedule("dualpipe")(2, 8)
    timeline = simulate(schedule, Costs.uniform(2, 10.0, 10.0, 10.0, 25.0))
    quick = tuple(
        tuple(span._replace(end=span.start + 1.0) if isinstance(span.action, Overlap) else span for span in spans)
        for spans in timeline.spans
    )
    assert measured_costs(replace(timeline, spans=quick)).hidden == (10.0, 10.0)
