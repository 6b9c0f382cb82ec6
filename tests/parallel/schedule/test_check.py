"""Faults of schedules, which the checker finds and locates."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule, parts
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import ScheduleError, check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.parallel.schedule.transfers import plan_transfers
from counterflow.settings import UsageError
from counterflow.tests.parallel.schedule.cases import examples, schedules

Orders = list[list[Action | Overlap]]


def actions(text: str) -> tuple[Action, ...]:
    """Parse "F0.1 B0.1": kind, micro-batch, stage."""
    read = []
    for token in text.split():
        microbatch, stage = map(int, token[1:].split("."))
        read.append(Action(token[0], stage, microbatch))  # type: ignore[arg-type]
    return tuple(read)


def two_ranks(first: str, second: str, microbatches: int = 2) -> Schedule:
    """A schedule of one stage per rank."""
    return Schedule("test", 2, 2, microbatches, ((0,), (1,)), (actions(first), actions(second)))


GOOD = two_ranks("F0.0 F1.0 B0.0 B1.0", "F0.1 B0.1 F1.1 B1.1")


def test_a_good_schedule_passes() -> None:
    assert check(GOOD).peak == (2, 1)


@pytest.mark.parametrize(
    ("schedule", "rank", "position", "message"),
    [
        (two_ranks("F0.0 F1.0 B0.0", "F0.1 B0.1 F1.1 B1.1"), 0, None, "B or I is missing for micro-batch 1, stage 0"),
        (two_ranks("F0.0 B0.0 B1.0", "F0.1 B0.1 F1.1 B1.1"), 0, 2, "F1 of stage 0 has not run on this rank before"),
        (two_ranks("F0.0 F1.0 B0.0 B1.0", "F0.1 B0.1"), 1, None, "F is missing for micro-batch 1, stage 1"),
        (
            two_ranks("F0.0 F1.0 B0.0 B1.0 B1.0", "F0.1 B0.1 F1.1 B1.1"),
            0,
            4,
            "B1 of stage 0 after its B",
        ),
        (
            two_ranks("F0.0 F1.0 B0.0 B1.0", "F0.1 B0.1 F0.1 F1.1 B1.1"),
            1,
            2,
            "F0 of stage 1 after its F",
        ),
        (two_ranks("F0.0 F1.0 I0.0 B1.0", "F0.1 B0.1 F1.1 B1.1"), 0, 2, "W0 of stage 0 is missing"),
        (two_ranks("F0.0 F1.0 W0.0 I0.0 B1.0", "F0.1 B0.1 F1.1 B1.1"), 0, 2, "I0 of stage 0 has not run"),
        (
            two_ranks("F0.0 F1.0 B0.0 W0.0 B1.0", "F0.1 B0.1 F1.1 B1.1"),
            0,
            3,
            "W0 of stage 0 after its B",
        ),
        (two_ranks("F0.0 F1.0 B0.0 B1.0", "B0.1 F0.1 F1.1 B1.1"), 1, 0, "F0 of stage 1 has not run on this rank"),
        (two_ranks("F0.0 F1.0 B0.0 B1.0", "F0.1 B0.1 F1.0 B1.1"), 1, 2, r"the rank holds stages \[1\], not 0"),
        (two_ranks("F0.0 F1.0 B0.0 B1.0", "F0.1 B0.1 F2.1 B1.1"), 1, 2, "there is no micro-batch 2, only 0 to 1"),
        (two_ranks("F0.0 F1.0 B0.0 X1.0", "F0.1 B0.1 F1.1 B1.1"), 0, 3, "kind 'X' is none of"),
    ],
)
def test_faults_are_named_with_rank_and_position(schedule: Schedule, rank: int, position: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        check(schedule)
    assert (caught.value.rank, caught.value.position) == (rank, position)
    if position is not None:
        assert caught.value.action == schedule.actions[rank][position]
        assert f"rank {rank}, position {position} ({caught.value.action})" in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_halves_of_a_pair_must_not_need_each_other() -> None:
    turn = Schedule("v", 1, 2, 2, ((0, 1),), ((),))
    f, b = (lambda stage, m: Action("F", stage, m)), (lambda stage, m: Action("B", stage, m))
    start = (f(0, 0), f(1, 0))
    check(replace(turn, actions=((*start, Overlap(f(0, 1), b(1, 0)), Overlap(f(1, 1), b(0, 0)), b(1, 1), b(0, 1)),)))
    with pytest.raises(ScheduleError, match="a pair is an F and a B or I, not F and F") as caught:
        check(replace(turn, actions=((*start, Overlap(f(0, 1), f(1, 1))),)))
    assert (caught.value.rank, caught.value.position) == (0, 2)
    with pytest.raises(ScheduleError, match="the two cannot be a pair"):
        check(replace(turn, actions=((f(0, 0), Overlap(f(1, 0), b(1, 0)), b(0, 0)),), num_microbatches=1))


def test_stages_on_one_rank_come_in_the_order_of_the_data() -> None:
    turn = Schedule("v", 1, 2, 1, ((0, 1),), ((),))
    check(replace(turn, actions=(actions("F0.0 F0.1 B0.1 B0.0"),)))
    for order, at in (("F0.1 F0.0 B0.1 B0.0", 0), ("F0.0 F0.1 B0.0 B0.1", 2), ("F0.0 F0.1 I0.0 I0.1 W0.1 W0.0", 2)):
        with pytest.raises(ScheduleError, match="which comes later") as caught:
            check(replace(turn, actions=(actions(order),)))
        assert caught.value.position == at


def test_forms_that_do_not_fit_are_refused() -> None:
    for change, message in (
        ({"num_microbatches": 0}, "num_microbatches is 0"),
        ({"stages_of_rank": ((0,),)}, "stages_of_rank is given for 1 ranks, but there are 2"),
        ({"stages_of_rank": ((0,), (0,))}, r"wrong or missing are \[1\]"),
        ({"stages_of_rank": ((0, 0), (1,))}, "holds a stage twice"),
        ({"actions": ()}, "actions is given for 0 ranks"),
        ({"num_stages": "2"}, "num_stages is '2', which is no int"),
        ({"stages_of_rank": (0, 1)}, r"rank 0: its stages must be a tuple of numbers, such as \(0,\), not the int 0"),
        ({"stages_of_rank": ((0,), ("1",))}, r"rank 1: its stages must be a tuple of numbers"),
        ({"stages_of_rank": 2}, "stages_of_rank must be a tuple with one entry per rank, not the int 2"),
        (
            {"actions": (GOOD.actions[0], iter(()))},
            "rank 1: its actions must be a tuple of Actions, not the tuple_",
        ),
    ):
        with pytest.raises(ScheduleError, match=message):
            check(replace(GOOD, **change))


F, B = Action("F", 0, 1), Action("B", 0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("F0", "position 1 ('F0'): expects an Action or an Overlap, not the str 'F0'"),
        (("F", 0, 1), "position 1 (('F', 0, 1)): expects an Action or an Overlap, not the tuple ('F', 0, 1)"),
        ((F, B), "expects an Action or an Overlap, not the tuple (Action("),
        (None, "position 1 (None): expects an Action or an Overlap, not the NoneType None"),
        (Action("F", 0, "0"), "microbatch '0' is no int"),  # type: ignore[arg-type]
        (Action("F", [0], 0), "stage [0] is no int"),  # type: ignore[arg-type]
        (Action(["F"], 0, 0), "kind ['F'] is none of F, B, I and W"),  # type: ignore[arg-type]
        (Overlap(F, ("B", 0, 0)), "a pair is of two Actions, not of the tuple ('B', 0, 0)"),  # type: ignore[arg-type]
        (Overlap(F, Action("B", 0, None)), "microbatch None is no int"),  # type: ignore[arg-type]
    ],
)
def test_an_entry_that_is_no_action_is_shown_with_its_position(wrong: object, message: str) -> None:
    order = (Action("F", 0, 0), wrong)
    with pytest.raises(ScheduleError) as caught:
        check(replace(GOOD, actions=(order, GOOD.actions[1])))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert (caught.value.rank, caught.value.position) == (0, 1)


def test_two_ranks_that_wait_for_each_others_data_are_found() -> None:
    crossed = two_ranks("F0.0 B0.0 F1.0 B1.0", "F0.1 F1.1 B0.1 B1.1")
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        check(crossed)
    text = str(caught.value)
    assert "rank 0 before B0 of stage 0 at position 1 waits until rank 1 sends the gradient of micro-batch 0" in text
    assert "rank 1 before F1 of stage 1 at position 1 waits until rank 0 sends the activation of micro-batch 1" in text
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(crossed, Costs.uniform(2))


def test_a_deadlock_of_blocking_sends_alone_is_found() -> None:
    """Inputs arrive in time if sends are buffered.

    If sends block, each rank's first outputs wait for a receive that the other rank posts only later, because both
    begin with micro-batches that the other rank needs late.
    """
    orders = (
        actions("F0.0 F1.0 F2.0 F3.1 F4.1 F5.1 B3.1 B4.1 B5.1 B0.0 B1.0 B2.0"),
        actions("F3.0 F4.0 F5.0 F0.1 F1.1 F2.1 B0.1 B1.1 B2.1 B3.0 B4.0 B5.0"),
    )
    schedule = Schedule("test", 2, 2, 6, ((0, 1), (1, 0)), orders)
    assert simulate(schedule, Costs.uniform(2)).step_time == 18  # no rank ever waits
    with pytest.raises(
        ScheduleError, match=r"deadlock.* rank 0 .*until rank 1 receives.* rank 1 .*until rank 0 receives"
    ):
        check(schedule)


def runs_with_blocking_sends(schedule: Schedule) -> bool:
    """Step every rank in turn, again and again, by the rendezvous of the checker's docstring."""
    boundaries = plan_transfers(schedule)
    at = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        reached = [
            [b for index in range(at[rank] + 1) for b in boundaries[rank][index : index + 1]] for rank in range(len(at))
        ]
        sent = {transfer for rank in reached for boundary in rank for transfer in boundary.sends}
        received = {transfer for rank in reached for boundary in rank for transfer in boundary.receives}
        for rank in range(schedule.num_ranks):
            if at[rank] < len(boundaries[rank]):
                here = boundaries[rank][at[rank]]
                if set(here.needs) <= sent and set(here.sends) <= received:
                    at[rank] += 1
                    moved = True
    return all(at[rank] == len(boundaries[rank]) for rank in range(schedule.num_ranks))


def swap(orders: Orders, draw: random.Random) -> None:
    rank = draw.choice([rank for rank, order in enumerate(orders) if order])
    here, there = draw.randrange(len(orders[rank])), draw.randrange(len(orders[rank]))
    orders[rank][here], orders[rank][there] = orders[rank][there], orders[rank][here]


def drop(orders: Orders, draw: random.Random) -> None:
    order = draw.choice([order for order in orders if order])
    order.pop(draw.randrange(len(order)))


def duplicate(orders: Orders, draw: random.Random) -> None:
    order = draw.choice([order for order in orders if order])
    order.insert(draw.randrange(len(order) + 1), draw.choice(order))


def move(orders: Orders, draw: random.Random) -> None:
    order = draw.choice([order for order in orders if order])
    action = order.pop(draw.randrange(len(order)))
    other = draw.choice([other for other in orders if other is not order] or [order])
    other.insert(draw.randrange(len(other) + 1), action)


def is_sound(schedule: Schedule) -> bool:
    """Whether the rules of a schedule hold, each restated with sets and positions."""
    work = list(schedule.work())
    at = {part: (rank, position) for rank, position, part in work}
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            whole, split = [Action(k, stage, m) for k in "FB"], [Action(k, stage, m) for k in "FIW"]
            found = [part for _, _, part in work if part[1:] == (stage, m)]
            if sorted(found) not in (sorted(whole), sorted(split)):
                return False
            positions = [at[part] for part in (whole if len(found) == 2 else split)]
            if positions != sorted(set(positions)) or len({rank for rank, _ in positions}) > 1:
                return False
            if stage not in schedule.stages_of_rank[positions[0][0]]:
                return False
            # Forward up, then backward down, where neighbouring stages share a rank.
            for kinds in ("F", "BI"):
                lower = next((at[part] for kind in kinds if (part := Action(kind, stage - 1, m)) in at), positions[0])
                upper = next(at[part] for kind in kinds if (part := Action(kind, stage, m)) in at)
                if stage and lower[0] == upper[0] and (lower < upper) != (kinds == "F"):
                    return False
    return all(
        not isinstance(action, Overlap) or len({part.microbatch for part in parts(action)}) == 2
        for order in schedule.actions
        for action in order
    )


@examples(300)
@given(
    schedule=schedules(ranks=6, microbatches=12),
    corrupt=st.sampled_from([swap, drop, duplicate, move]),
    seed=st.integers(0, 2**32),
)
def test_a_corrupted_schedule_is_refused_or_still_right(
    schedule: Schedule, corrupt: Callable[[Orders, random.Random], None], seed: int
) -> None:
    orders = [list(order) for order in schedule.actions]
    corrupt(orders, random.Random(seed))
    corrupted = replace(schedule, actions=tuple(map(tuple, orders)))
    fault = fault_of(corrupted)
    assert (fault is None) == (is_sound(corrupted) and runs_with_blocking_sends(corrupted))
    if fault is None:
        simulate(corrupted, Costs.uniform(corrupted.num_stages))
    else:
        assert fault.rank is not None
        if fault.position is not None and fault.position < len(corrupted.actions[fault.rank]):
            assert fault.action == corrupted.actions[fault.rank][fault.position]
    assert fault or corrupt not in (drop, duplicate)


def fault_of(schedule: Schedule) -> ScheduleError | None:
    try:
        check(schedule)
    except ScheduleError as fault:
        return fault
    return None


def test_a_schedule_with_backwards_is_refused_for_evaluation() -> None:
    with pytest.raises(ScheduleError, match="has forwards alone") as caught:
        check(GOOD, training=False)
    assert caught.value.action == Action("B", 0, 0)


def test_peak_counts_a_pairs_forward_before_its_backward_is_done() -> None:
    paired = find_schedule("dualpipev")(1, 4)
    assert any(isinstance(action, Overlap) for action in paired.actions[0])
    assert check(paired).peak == (3,)
