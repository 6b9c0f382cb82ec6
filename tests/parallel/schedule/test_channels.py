"""Transfers queue in their channel, as on NCCL: channels of ordered pairs of ranks never block each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from counterflow.parallel.schedule.actions import Schedule
from counterflow.parallel.schedule.catalogue import find_schedule, schedule_names
from counterflow.parallel.schedule.transfers import Transfer, links, plan_transfers
from counterflow.settings import UsageError

Channel = Callable[[Transfer], object]


def own(transfer: Transfer) -> object:
    """The channel of an ordered pair of ranks, as in `Groups.channels`."""
    return transfer.source, transfer.target


def one_a_direction(transfer: Transfer) -> object:
    """The channel of all ranks for a direction."""
    return transfer.source < transfer.target


def ends(schedule: Schedule, channel: Channel) -> bool:
    """Whether every rank ends if a transfer runs once it is the first in its channel on both sides."""
    plan = plan_transfers(schedule)
    queues: dict[tuple[int, object], deque[Transfer]] = {}
    done: set[Transfer] = set()
    at = [-1] * schedule.num_ranks  # the boundary that was posted last
    moved = True
    while moved:
        moved = False
        for rank, boundaries in enumerate(plan):
            while at[rank] + 1 < len(boundaries) and (at[rank] < 0 or done.issuperset(boundaries[at[rank]].needs)):
                at[rank] += 1
                moved = True
                for transfer in (*boundaries[at[rank]].receives, *boundaries[at[rank]].sends):
                    queues.setdefault((rank, channel(transfer)), deque()).append(transfer)
        for queue in queues.values():
            while queue:
                transfer = queue[0]
                sides = [queues.get((rank, channel(transfer))) for rank in (transfer.source, transfer.target)]
                if not all(side and side[0] == transfer for side in sides):
                    break
                for side in sides:
                    assert side is not None
                    side.popleft()
                done.add(transfer)
                moved = True
    return all(position == len(boundaries) - 1 for position, boundaries in zip(at, plan, strict=True))


@pytest.mark.parametrize("name", schedule_names())
def test_no_channel_blocks_another(name: str) -> None:
    for ranks in range(2, 9):
        for microbatches in (1, 2, 3, 5, 8, 13, 2 * ranks, 32):
            try:
                schedule = find_schedule(name)(ranks, microbatches)
            except UsageError:
                continue  # an odd number of ranks
            assert ends(schedule, own), (ranks, microbatches)


def test_one_group_for_all_ranks_would_deadlock() -> None:
    """A send waits behind a receive that depends on it, so every link needs its own groups."""
    assert not ends(find_schedule("1f1b")(4, 5), one_a_direction)
    assert not ends(find_schedule("dualpipe")(4, 8), one_a_direction)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1f1b", [(0, 1), (1, 2), (2, 3)]),
        ("interleaved", [(0, 1), (0, 3), (1, 2), (2, 3)]),
        ("dualpipe", [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_links_join_neighbouring_stages(name: str, expected: list[tuple[int, int]]) -> None:
    assert sorted(links(find_schedule(name)(4, 8))) == expected
