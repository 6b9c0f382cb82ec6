"""NCCL's rules on programs written by hand: what ends, what waits for ever, and how that is told."""

from __future__ import annotations

import pytest

from counterflow.dryrun.machine import rehearse
from counterflow.dryrun.rules import (
    Event,
    Group,
    HostWait,
    Join,
    Launch,
    MismatchError,
    Rules,
    Wait,
    always_room,
)

BOTH = (0, 1)


def pair(ctas: int = 2, *names: str) -> dict[int, dict[str, Group]]:
    return {rank: {name: Group(BOTH, ctas) for name in names} for rank in BOTH}


def told(*programs: list[Event], rules: Rules | None = None, ctas: int = 2) -> list[str]:
    names = sorted({event.communicator for program in programs for event in program if isinstance(event, Launch)})
    return [str(each) for each in rehearse(dict(enumerate(programs)), pair(ctas, *names), rules)]


def crossing(ahead: str, back: str) -> tuple[list[Event], list[Event]]:
    """Two ranks that send to each other at the same time, and then receive."""
    first: list[Event] = [Launch(ahead, "send", 1), Launch(back, "recv", 1), Wait(1), Wait(0)]
    return first, [Launch(back, "send", 0), Launch(ahead, "recv", 0), Wait(1), Wait(0)]


def test_sends_that_cross_need_a_communicator_for_each_direction() -> None:
    assert told(*crossing("0 to 1", "1 to 0"), rules=Rules(order="none")) == []
    assert told(*crossing("0 to 1", "1 to 0"), rules=Rules(order="start")) == []
    assert told(*crossing("link", "link")) == [
        "rank 0: send 0 to 1 of link (0, 1) runs until rank 1 starts it",
        "rank 1: recv 0 from 0 of link (0, 1) is behind send 0 to 0 of link (0, 1) in one queue",
        "rank 1: send 0 to 0 of link (0, 1) runs until rank 0 starts it",
        "rank 0: recv 0 from 1 of link (0, 1) is behind send 0 to 1 of link (0, 1) in one queue",
    ]


def test_messages_of_a_channel_are_matched_by_their_order() -> None:
    source: list[Event] = [Launch("0 to 1", "send", 1), Launch("0 to 1", "send", 1), Wait(1)]
    target: list[Event] = [Launch("0 to 1", "recv", 0), Wait(0), HostWait(), Launch("0 to 1", "recv", 0)]
    assert told(source, target) == []
    with pytest.raises(MismatchError, match="rank 1 ends without launching send 1 to 1"):
        told(source, target[:3])


def test_waits_hold_what_the_stream_launches_later() -> None:
    first: list[Event] = [Launch("a", "alltoall"), Wait(0), Launch("b", "alltoall"), Wait(1)]
    swapped: list[Event] = [Launch("b", "alltoall"), Wait(0), Launch("a", "alltoall"), Wait(1)]
    assert told(first, first) == []
    assert told(first, swapped) == [
        "rank 0: alltoall 0 of a (0, 1) runs until rank 1 starts it",
        "rank 1: alltoall 0 of a (0, 1) starts when its stream is past alltoall 0 of b (0, 1)",
        "rank 1: alltoall 0 of b (0, 1) runs until rank 0 starts it",
        "rank 0: alltoall 0 of b (0, 1) starts when its stream is past alltoall 0 of a (0, 1)",
    ]


def test_a_wait_of_another_stream_holds_nothing_until_the_streams_join() -> None:
    first: list[Event] = [Launch("a", "alltoall"), Wait(0, "side"), Launch("b", "alltoall"), Wait(1)]
    swapped: list[Event] = [Launch("b", "alltoall"), Wait(0, "side"), Launch("a", "alltoall"), Wait(1)]
    assert told(first, swapped) == []
    joined = [[*program[:2], Join("compute", "side"), *program[2:]] for program in (first, swapped)]
    assert len(told(*joined)) == 4


def test_a_host_that_waits_launches_nothing() -> None:
    first: list[Event] = [Launch("a", "alltoall"), Wait(0), HostWait(label="counts"), Launch("b", "alltoall")]
    swapped: list[Event] = [Launch("b", "alltoall"), Wait(0), Launch("a", "alltoall")]
    circle = told(first, swapped)
    assert "rank 0: the host waits in counts for alltoall 0 of a (0, 1)" in circle
    assert "rank 1: alltoall 0 of b (0, 1) runs until rank 0 starts it" in circle
    assert told([first[0], *first[2:]], swapped) == [], "without the wait of a stream the host waits for nothing"


OPPOSITE: tuple[list[Event], list[Event]] = (
    [Launch("dp", "reduce_scatter"), Launch("edp", "reduce_scatter"), Wait(0), Wait(1)],
    [Launch("edp", "reduce_scatter"), Launch("dp", "reduce_scatter"), Wait(1), Wait(0)],
)
"""Reductions of mirrored ranks, which finish their backwards in opposite orders."""


def test_opposite_orders_end_where_kernels_only_start_in_order() -> None:
    assert told(*OPPOSITE, rules=Rules(order="start")) == []
    assert told(*OPPOSITE, rules=Rules(order="none")) == []
    assert told(*OPPOSITE, rules=Rules(order="end")) == [
        "rank 0: reduce_scatter 0 of dp (0, 1) runs until rank 1 starts it",
        "rank 1: reduce_scatter 0 of dp (0, 1) starts when reduce_scatter 0 of edp (0, 1) has ended, "
        "which was launched before",
        "rank 1: reduce_scatter 0 of edp (0, 1) runs until rank 0 starts it",
        "rank 0: reduce_scatter 0 of edp (0, 1) starts when reduce_scatter 0 of dp (0, 1) has ended, "
        "which was launched before",
    ]


def test_streams_that_share_a_queue_hold_each_other_up() -> None:
    behind: list[Event] = [Launch("a", "alltoall"), Launch("a", "alltoall"), Launch("b", "alltoall"), Wait(2)]
    first: list[Event] = [*behind, HostWait(), Wait(1)]
    second: list[Event] = [
        Launch("b", "alltoall"),
        Wait(0),
        HostWait(),
        Launch("a", "alltoall"),
        Launch("a", "alltoall"),
    ]
    assert told(first, second) == [] == told(first, second, rules=Rules(connections=3))
    circle = told(first, second, rules=Rules(connections=1))
    shares = "rank 0: alltoall 0 of b (0, 1) shares a queue of the hardware with one that waits for alltoall 1 of a"
    assert any(line.startswith(shares) for line in circle), circle
    assert told(first, second, rules=Rules(order="start")), "an order of starts is one queue for all"


def test_kernels_without_room_wait_for_those_that_have_it() -> None:
    groups = pair(66, "dp", "edp")[0]
    assert always_room(groups, Rules(multiprocessors=132)) and not always_room(groups, Rules(multiprocessors=131))
    assert told(*OPPOSITE, rules=Rules(multiprocessors=132), ctas=66) == []
    stuck = told(*OPPOSITE, rules=Rules(multiprocessors=100), ctas=66)
    assert any(
        "edp (0, 1) needs 66 of 100 multiprocessors: 66 by reduce_scatter 0 of dp (0, 1)" in line for line in stuck
    )


def test_without_an_order_the_hardware_may_choose_wrongly() -> None:
    same: list[Event] = [Launch("dp", "reduce_scatter"), Launch("edp", "reduce_scatter"), Wait(0), Wait(1)]
    crowded = [told(same, same, rules=Rules(100, "none", seed=seed), ctas=66) for seed in range(20)]
    assert any(crowded) and not all(crowded)
    assert told(same, same, rules=Rules(100, "start"), ctas=66) == [], "with an order all ranks choose alike"
    assert not any(told(same, same, rules=Rules(132, "none", seed=seed), ctas=66) for seed in range(20))


def test_what_does_not_belong_together_is_named() -> None:
    with pytest.raises(MismatchError, match="rank 1 ends without launching alltoall 1 of a"):
        told([Launch("a", "alltoall"), Launch("a", "alltoall")], [Launch("a", "alltoall")])
    with pytest.raises(MismatchError, match=r"0 launches alltoall 0 of a .*1 launches allgather 0 of a"):
        told([Launch("a", "alltoall")], [Launch("a", "allgather")])
