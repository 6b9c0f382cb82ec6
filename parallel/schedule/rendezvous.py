"""Deadlocks: ranks of a schedule that wait for each other when a send blocks until it is received."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .actions import Action, Overlap, Schedule, parts
from .transfers import Dataflow, Transfer, post_receives


class Wait(NamedTuple):
    """A rank that cannot pass a boundary."""

    rank: int
    position: int
    """Position of the action that the rank cannot begin; the number of its actions where it has run them all."""
    action: Action | Overlap | None
    transfer: Transfer
    other: int
    """The rank that must send or receive the transfer first."""

    def __str__(self) -> str:
        blocked = "leaving" if self.action is None else f"{self.action} at position {self.position}"
        verb = "sends" if self.other == self.transfer.source else "receives"
        return f"rank {self.rank} before {blocked} waits until rank {self.other} {verb} the {self.transfer}"


def find_deadlock(schedule: Schedule) -> list[Wait]:
    """A circle of ranks in which each waits for the next and the last for the first; empty where there is none.

    A rank reaches a boundary and posts its receives and sends there. It passes once the inputs of the coming action
    have been sent, and the target of every send has reached the boundary where it is received. Linear in the actions.
    """
    dataflow = Dataflow(schedule)
    posted_at = post_receives(schedule, dataflow)
    reached = [0] * schedule.num_ranks
    stuck: list[int | None] = [None] * schedule.num_ranks  # the output that the rank waits to receive or to send
    sleepers: dict[tuple[int, int], list[int]] = {}  # by (rank, boundary): the ranks that wait for its arrival there
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        stuck[rank] = None
        while reached[rank] <= len(schedule.actions[rank]):
            for output, other, boundary in _conditions(schedule, dataflow, posted_at, rank, reached[rank]):
                if reached[other] < boundary:
                    stuck[rank] = output
                    sleepers.setdefault((other, boundary), []).append(rank)
                    break
            if stuck[rank] is not None:
                break
            reached[rank] += 1
            ready += sleepers.pop((rank, reached[rank]), ())
    return _circle(schedule, dataflow, reached, stuck)


def _conditions(
    schedule: Schedule, dataflow: Dataflow, posted_at: list[int], rank: int, boundary: int
) -> Iterator[tuple[int, int, int]]:
    """Conditions to pass `boundary`: for each output concerned, a rank and the boundary that it must have reached."""
    actions = schedule.actions[rank]
    if boundary < len(actions):
        for part in parts(actions[boundary]):
            needed = dataflow.input_of(part)
            if needed >= 0 and dataflow.ranks[needed] != rank:
                yield needed, dataflow.ranks[needed], dataflow.positions[needed] + 1
    if boundary > 0:
        for part in parts(actions[boundary - 1]):
            target = dataflow.target_of(part)
            if target is not None and target != rank:
                output = dataflow.number(part)
                yield output, target, posted_at[output]


def _circle(schedule: Schedule, dataflow: Dataflow, reached: list[int], stuck: list[int | None]) -> list[Wait]:
    """The circle that is reached from the first stuck rank by going on to the rank that each one waits for."""
    rank = next((rank for rank, output in enumerate(stuck) if output is not None), None)
    waits: list[Wait] = []
    while rank is not None and rank not in [wait.rank for wait in waits]:
        output = stuck[rank]
        # A rank that has finished has passed every boundary, so no rank waits for it.
        assert output is not None, f"rank {rank} is not stuck, yet another waits for it"
        source = dataflow.ranks[output]
        made = parts(schedule.actions[source][dataflow.positions[output]])
        transfer = next(dataflow.transfer_of(part, source) for part in made if dataflow.number(part) == output)
        assert transfer is not None, f"{made} was waited for, but has no output for another rank"
        position, actions = reached[rank], schedule.actions[rank]
        other = transfer.target if rank == source else source
        waits.append(Wait(rank, position, actions[position] if position < len(actions) else None, transfer, other))
        rank = other
    first = next((index for index, wait in enumerate(waits) if wait.rank == rank), 0)
    return waits[first:]
