"""Communication under way in one hop or several, advanced by hand: no threads, no streams of our own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

Hops = Generator[None, None, Result]
"""Launches a hop, yields, waits for it, launches the next, and so on; returns the result after the last wait."""


class HoppedTransfer(Generic[Result]):
    """A generator of hops whose first hop is launched when it is made.

    Args:
        hops: the generator.
        count: how often it launches.
        phases_before_next_hop: phases of computation after which the next hop is launched, if nobody waits before;
            see `InFlight`.
    """

    def __init__(self, hops: Hops[Result], count: int = 1, phases_before_next_hop: int = 1) -> None:
        self._hops = hops
        self._left = count
        self._result: list[Result] = []
        self.phases_before_next_hop = phases_before_next_hop
        self.age = 0
        self._go_on()

    @property
    def can_advance(self) -> bool:
        """Whether there are hops left to launch."""
        return self._left > 0

    def advance(self) -> None:
        """Wait for the hop under way and launch the next."""
        assert self.can_advance, "all hops have been launched"
        self.age = 0
        self._go_on()

    def wait(self) -> Result:
        """Go through all hops that are left; once."""
        while not self._result:
            self._go_on()
        self._left = 0
        return self._result.pop()

    def _go_on(self) -> None:
        self._left -= 1
        try:
            next(self._hops)
        except StopIteration as end:
            self._result.append(end.value)


class InFlight:
    """The transfers of a rank that have hops left to launch.

    Between two hops rows have to be received and sorted, which nobody does while the host computes. So whoever runs a
    model's phases calls `boundary` after each: a transfer goes on to its next hop once `phases_before_next_hop` phases
    have run since the one in which its last hop was launched. The ranks of a group run the same phases in the same
    order, so they launch the same hops in the same order, as collective libraries want it.
    """

    def __init__(self) -> None:
        self._transfers: list[HoppedTransfer[Any]] = []

    def add(self, transfer: HoppedTransfer[Any]) -> None:
        if transfer.can_advance:
            self._transfers.append(transfer)

    def boundary(self) -> None:
        """A phase has ended."""
        for transfer in self._transfers:
            if transfer.can_advance:
                if transfer.age >= transfer.phases_before_next_hop:
                    transfer.advance()
                transfer.age += 1
        self._transfers = [transfer for transfer in self._transfers if transfer.can_advance]
