"""Our schedules compared with DeepSeek's public code and torch.distributed.pipelining."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.simulate import simulate
from counterflow.tests.parallel.schedule.cases import costs, examples, parse_order

RECORDED = json.loads(Path(__file__).with_name("deepseek_orders.json").read_text(encoding="utf-8"))
DEEPSEEK = [(name, *map(int, size.split())) for name in ("dualpipe", "dualpipev") for size in RECORDED[name]]


def deepseeks(name: str, ranks: int, microbatches: int) -> Schedule:
    ours = find_schedule(name)(ranks, microbatches)
    orders = RECORDED[name][f"{ranks} {microbatches}"]
    return replace(ours, name=f"DeepSeek's {name}", actions=tuple(map(parse_order, orders)))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), DEEPSEEK)
def test_order_equals_deepseeks_public_code(name: str, ranks: int, microbatches: int) -> None:
    public = deepseeks(name, ranks, microbatches)
    assert check(public).peak == (2 * ranks + 1 if name == "dualpipev" else ranks + 1,) * ranks
    assert find_schedule(name)(ranks, microbatches).actions == public.actions


@examples(100)
@given(case=st.sampled_from(DEEPSEEK), data=st.data())
def test_step_is_no_longer_than_in_deepseeks_public_code(case: tuple[str, int, int], data: st.DataObject) -> None:
    name, ranks, microbatches = case
    public = deepseeks(name, ranks, microbatches)
    given_costs = data.draw(costs(public.num_stages))
    ours = simulate(find_schedule(name)(ranks, microbatches), given_costs)
    assert ours.step_time <= simulate(public, given_costs).step_time


_KINDS = {
    torch_schedules.FORWARD: "F",
    torch_schedules.FULL_BACKWARD: "B",
    torch_schedules.BACKWARD_INPUT: "I",
    torch_schedules.BACKWARD_WEIGHT: "W",
}


def translate(order: list) -> tuple[Action | Overlap, ...]:
    """Translate torch's actions, without its gaps and gradient reductions."""
    translated: list[Action | Overlap] = []
    for action in order:
        if action is None:
            continue
        if action.sub_actions is not None:
            translated.append(Overlap(*translate(list(action.sub_actions))))
        elif action.computation_type in _KINDS:
            translated.append(Action(_KINDS[action.computation_type], action.stage_index, action.microbatch_index))
    return tuple(translated)


def torchs(cls: type, ranks: int, microbatches: int, stages_per_rank: int) -> tuple[tuple[Action | Overlap, ...], ...]:
    """The orders of torch's schedule, from the function that its constructor calls, without stages and processes."""
    groups = max(1, microbatches // ranks)
    schedule = SimpleNamespace(
        pp_group_size=ranks,
        n_local_stages=stages_per_rank,
        number_of_rounds=groups,
        microbatches_per_round=microbatches // groups,
        _n_microbatches=microbatches,
        _num_stages=ranks * stages_per_rank,
    )
    if hasattr(cls, "_calculate_single_rank_operations"):
        orders = [cls._calculate_single_rank_operations(schedule, rank) for rank in range(ranks)]
    else:
        orders = [cls._get_pipeline_order(schedule)[rank] for rank in range(ranks)]
    return tuple(map(translate, orders))


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (1, 5), (2, 2), (2, 7), (4, 4), (4, 9), (5, 12), (8, 20)])
def test_1f1b_is_torchs(ranks: int, microbatches: int) -> None:
    *ours, our_last = find_schedule("1f1b")(ranks, microbatches).actions
    *others, other_last = torchs(torch_schedules.Schedule1F1B, ranks, microbatches, 1)
    assert ours == others
    # torch's table, which its own 1F1B does not use, counts the last rank's forwards from 1.
    assert our_last == tuple(a._replace(microbatch=a.microbatch - (a.kind == "F")) for a in other_last)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (2, 8), (3, 9), (4, 4), (4, 8), (4, 16), (8, 24)])
@pytest.mark.parametrize("stages", [2, 3])
def test_interleaved_is_torchs_where_ranks_divide_the_microbatches(ranks: int, microbatches: int, stages: int) -> None:
    ours = find_schedule("interleaved")(ranks, microbatches, stages_per_rank=stages)
    assert ours.actions == torchs(torch_schedules.ScheduleInterleaved1F1B, ranks, microbatches, stages)


def test_interleaved_with_one_stage_per_rank_is_1f1b() -> None:
    for ranks, microbatches in itertools.product(range(1, 7), range(1, 20)):
        ours = find_schedule("interleaved")(ranks, microbatches, stages_per_rank=1)
        assert ours.actions == find_schedule("1f1b")(ranks, microbatches).actions


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (3, 9), (4, 8), (4, 16), (8, 24)])
def test_zb1p_is_torchs(ranks: int, microbatches: int) -> None:
    ours = find_schedule("zb1p")(ranks, microbatches)
    assert ours.actions == torchs(torch_schedules.ScheduleInterleavedZeroBubble, ranks, microbatches, 1)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (2, 9), (3, 6), (4, 11), (8, 16)])
def test_dualpipev_is_torchs(ranks: int, microbatches: int) -> None:
    ours = find_schedule("dualpipev")(ranks, microbatches)
    assert ours.actions == torchs(torch_schedules.ScheduleDualPipeV, ranks, microbatches, 2)


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 8), (3, 5)])
def test_gpipe_is_torchs_but_for_the_order_of_backwards(ranks: int, microbatches: int) -> None:
    """Backwards run in the order of the forwards in torch, in the opposite order in the paper's figure."""
    ours = find_schedule("gpipe")(ranks, microbatches).actions
    for order, other in zip(ours, torchs(torch_schedules.ScheduleGPipe, ranks, microbatches, 1), strict=True):
        assert order[:microbatches] == other[:microbatches]
        assert order[microbatches:] == other[microbatches:][::-1]
