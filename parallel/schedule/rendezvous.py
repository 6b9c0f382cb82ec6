"""Whether the ranks of a schedule can end up waiting for each other, when a send blocks until it is received."""

from __future__ import annotations

from typing import NamedTuple

from .actions import Action, Overlap, Schedule
from .transfers import Transfer, plan_transfers


class Wait(NamedTuple):
    """A rank that cannot go on past a boundary."""

    rank: int
    position: int
    """That of the action which the rank cannot begin; the number of its actions where it has done them all."""
    action: Action | Overlap | None
    transfer: Transfer
    other: int
    """The rank that must send it or receive it first."""

    def __str__(self) -> str:
        what = "leaving" if self.action is None else f"{self.action} at position {self.position}"
        verb = "sends" if self.other == self.transfer.source else "receives"
        return f"rank {self.rank} before {what} waits until rank {self.other} {verb} the {self.transfer}"


def find_deadlock(schedule: Schedule) -> list[Wait]:
    """A circle of ranks in which each waits for the next and the last for the first; empty where there is none.

    A rank reaches a boundary, posts its receives and sends there, and passes when what the coming action needs has
    been sent and the target of everything it sent has come to the boundary that receives it. Linear in the actions.
    """
    boundaries = plan_transfers(schedule)
    sent_at: dict[Transfer, int] = {}
    received_at: dict[Transfer, int] = {}
    for rank_boundaries in boundaries:
        for index, boundary in enumerate(rank_boundaries):
            sent_at.update(dict.fromkeys(boundary.sends, index))
            received_at.update(dict.fromkeys(boundary.receives, index))

    reached = [0] * schedule.num_ranks
    stuck: list[tuple[Transfer, int] | None] = [None] * schedule.num_ranks
    sleepers: dict[tuple[int, int], list[int]] = {}  # who waits until this rank comes to this boundary
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        stuck[rank] = None
        while stuck[rank] is None and reached[rank] < len(boundaries[rank]):
            boundary = boundaries[rank][reached[rank]]
            for transfer in boundary.needs:
                if reached[transfer.source] < sent_at[transfer]:
                    stuck[rank] = transfer, transfer.source
                    sleepers.setdefault((transfer.source, sent_at[transfer]), []).append(rank)
                    break
            else:
                for transfer in boundary.sends:
                    if reached[transfer.target] < received_at[transfer]:
                        stuck[rank] = transfer, transfer.target
                        sleepers.setdefault((transfer.target, received_at[transfer]), []).append(rank)
                        break
                else:
                    reached[rank] += 1
                    ready += sleepers.pop((rank, reached[rank]), ())

    return _circle(schedule, reached, stuck)


def _circle(schedule: Schedule, reached: list[int], stuck: list[tuple[Transfer, int] | None]) -> list[Wait]:
    """From a rank that is stuck along those it waits for, until one comes again: who stands in that circle."""
    rank = next((rank for rank, wait in enumerate(stuck) if wait is not None), None)
    waits: list[Wait] = []
    while rank is not None and rank not in [wait.rank for wait in waits]:
        waiting = stuck[rank]
        # A rank that is through has passed every boundary, so nobody waits for it.
        assert waiting is not None, f"rank {rank} is not stuck, yet another waits for it"
        position, actions = reached[rank], schedule.actions[rank]
        waits.append(Wait(rank, position, actions[position] if position < len(actions) else None, *waiting))
        rank = waiting[1]
    first = next((index for index, wait in enumerate(waits) if wait.rank == rank), 0)
    return waits[first:]
