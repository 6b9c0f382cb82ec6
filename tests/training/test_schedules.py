"""The links between pipeline ranks are those of the schedules that the run can make."""

from __future__ import annotations

import pytest

from counterflow.configs.load import load_config
from counterflow.data.loader import micro_batch_count
from counterflow.parallel.layout import Layout
from counterflow.parallel.schedule.actions import Schedule, forward_only
from counterflow.parallel.schedule.catalogue import schedule_names
from counterflow.parallel.schedule.choose import generate
from counterflow.parallel.schedule.transfers import links, plan_transfers
from counterflow.settings import UsageError
from counterflow.training.schedules import LAST_NEW_FORM, distinct_forms, links_of_run, sizes_of_run

EVERY = pytest.mark.parametrize("name", sorted(schedule_names()))


def pairs_that_send(schedule: Schedule) -> set[tuple[int, int]]:
    """Pairs of ranks, lower first, of all transfers that the executor makes."""
    boundaries = (boundary for boundaries in plan_transfers(schedule) for boundary in boundaries)
    sends = [transfer for boundary in boundaries for transfer in boundary.sends]
    return {(min(send.source, send.target), max(send.source, send.target)) for send in sends}


def schedule_of(name: str, pp: int, count: int) -> Schedule | None:
    try:
        return generate(name, pp, count, {})
    except UsageError:
        return None


@EVERY
@pytest.mark.parametrize("pp", [2, 4])
def test_links_of_a_schedule_are_those_of_its_transfers(name: str, pp: int) -> None:
    made = [schedule for count in range(1, 4 * pp) if (schedule := schedule_of(name, pp, count)) is not None]
    assert made
    for schedule in made:
        assert links(schedule) == pairs_that_send(schedule)


@EVERY
@pytest.mark.parametrize("pp", [2, 4])
def test_no_step_and_no_evaluation_of_a_run_needs_a_link_that_was_not_made(name: str, pp: int) -> None:
    """A ramp from one micro-batch to ten per pipeline rank, and evaluations of every length up to the configured."""
    full = 10 * pp
    layout = Layout(2 * pp, pp, 2, 8)
    config = load_config(
        "tiny",
        [
            "model.num_hidden_layers=8",
            f"parallel.pp={pp}",
            f"parallel.schedule={name}",
            "batch.micro_sequences=2",
            f"batch.global_sequences={4 * full}",
            "batch.ramp.start=4",
            "batch.ramp.increment=4",
            "batch.ramp.tokens=1e6",
            f"train.evaluate_sequences={4 * full - 3}",
        ],
    )
    made = links_of_run(config, layout)
    counts = {micro_batch_count(size, layout.dp, 2) for size in sizes_of_run(config)}
    assert counts == set(range(1, full + 1))
    for count in counts:
        if (schedule := schedule_of(name, pp, count)) is not None:
            assert pairs_that_send(schedule) <= made
            assert pairs_that_send(forward_only(schedule)) <= made


def test_only_links_that_a_schedule_of_the_run_uses_are_made() -> None:
    config = load_config("tiny", ["model.num_hidden_layers=8", "parallel.pp=4", "parallel.schedule=1f1b"])
    assert links_of_run(config, Layout(4, 4, 1, 8)) == {(0, 1), (1, 2), (2, 3)}
    assert links_of_run(load_config("tiny", []), Layout(2, 1, 2, 8)) == set()


def test_work_on_a_long_ramp_is_bounded() -> None:
    counts = distinct_forms(range(3, 5000, 3), 4)
    assert counts == [*range(3, 4 * LAST_NEW_FORM + 1, 3), 4998]
    assert distinct_forms([900], 2) == [900]
