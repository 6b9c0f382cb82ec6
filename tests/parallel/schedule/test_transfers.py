"""Transfers that follow from the actions, posted so that they overlap and stay in order."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given

from counterflow.parallel.schedule.actions import Action, Schedule
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.transfers import Transfer, plan_transfers
from counterflow.tests.parallel.schedule.cases import examples, schedules


def positions_of(schedule: Schedule) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Rank and position of every forward and backward; a B and an I count as one kind."""
    return {
        ("F" if part.kind == "F" else "B", part.stage, part.microbatch): (rank, position)
        for rank, position, part in schedule.work()
        if part.kind != "W"
    }


@examples(80)
@given(schedule=schedules(ranks=8, microbatches=24))
def test_a_transfer_joins_its_producer_and_its_consumer(schedule: Schedule) -> None:
    at = positions_of(schedule)
    expected = set()
    for (kind, stage, microbatch), (source, position) in at.items():
        consumer = at.get((kind, stage + 1 if kind == "F" else stage - 1, microbatch))
        if consumer is not None and consumer[0] != source:
            name = "activation" if kind == "F" else "gradient"
            expected.add((Transfer(name, stage, microbatch, source, consumer[0]), position + 1, consumer[1]))
    plan = plan_transfers(schedule)
    assert [len(boundaries) for boundaries in plan] == [len(actions) + 1 for actions in schedule.actions]
    sent = [(t, index) for boundaries in plan for index, b in enumerate(boundaries) for t in b.sends]
    needed = {t: index for boundaries in plan for index, b in enumerate(boundaries) for t in b.needs}
    assert len(sent) == len(expected) == len(needed)
    assert {(transfer, index, needed[transfer]) for transfer, index in sent} == expected
    for rank, boundaries in enumerate(plan):
        assert all(t.source == rank for b in boundaries for t in b.sends)
        assert all(t.target == rank for b in boundaries for t in (*b.receives, *b.needs))


@examples(80)
@given(schedule=schedules(ranks=8, microbatches=24))
def test_receives_of_a_channel_are_posted_in_the_order_of_its_sends(schedule: Schedule) -> None:
    sent, received = defaultdict(list), defaultdict(list)
    for boundaries in plan_transfers(schedule):
        for boundary in boundaries:
            for transfer in boundary.sends:
                sent[transfer.source, transfer.target].append(transfer)
            for transfer in boundary.receives:
                received[transfer.source, transfer.target].append(transfer)
    assert sent == received


@examples(80)
@given(schedule=schedules(ranks=8, microbatches=24))
def test_receives_are_posted_one_action_ahead_and_earlier_only_for_the_order(schedule: Schedule) -> None:
    for rank, boundaries in enumerate(plan_transfers(schedule)):
        posted = {t: index for index, boundary in enumerate(boundaries) for t in boundary.receives}
        needed = {t: index for index, boundary in enumerate(boundaries) for t in boundary.needs}
        channels = defaultdict(list)
        for transfer in posted:
            channels[transfer.source].append(transfer)
        for channel in channels.values():
            for index, transfer in enumerate(channel):
                # The boundary before the last action that is not a W, for this transfer and those behind it.
                ahead = []
                for later in channel[index:]:
                    before = range(needed[later])
                    ahead.append(max((i for i in before if schedule.actions[rank][i][0] != "W"), default=0))
                assert posted[transfer] == min(ahead)
                assert posted[transfer] <= needed[transfer]


def test_the_turn_of_a_v_stays_on_its_rank() -> None:
    plan = plan_transfers(find_schedule("dualpipev")(1, 4))
    assert not any(boundary.sends or boundary.receives or boundary.needs for boundary in plan[0])


def test_a_pair_sends_its_forwards_output_first() -> None:
    schedule = find_schedule("dualpipe")(4, 8)
    pair = next(i for i, action in enumerate(schedule.actions[0]) if not isinstance(action, Action))
    sends = plan_transfers(schedule)[0][pair + 1].sends
    assert [transfer.kind for transfer in sends] == ["activation", "gradient"]
    assert {(transfer.source, transfer.target) for transfer in sends} == {(0, 1)}


def test_a_transfer_reads_as_a_sentence() -> None:
    transfer = Transfer("gradient", stage=2, microbatch=5, source=2, target=1)
    assert str(transfer) == "gradient of micro-batch 5 that stage 2 made, from rank 2 to rank 1"
