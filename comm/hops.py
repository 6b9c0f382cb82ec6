"""Transfers of one hop or several, advanced by explicit calls, without extra threads or streams."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

Hops = Generator[None, None, Result]
"""Generator that launches a hop, yields, waits for it, launches the next, and so on; returns after the last wait."""


class HoppedTransfer(Generic[Result]):
    """Transfer along a generator of hops; the constructor launches the first hop.

    Args:
        hops: the generator.
        count: number of hops that it launches.
        phases_before_next_hop: phases of computation after which the next hop is launched, unless `wait` comes first;
            see `InFlight`.
    """

    def __init__(self, hops: Hops[Result], count: int = 1, phases_before_next_hop: int = 1) -> None:
        self._hops = hops
        self._left = count
        self._result: list[Result] = []
        self.phases_before_next_hop = phases_before_next_hop
        self.phases_since_launch = 0
        self._resume()

    @property
    def can_advance(self) -> bool:
        """Whether there are hops left to launch."""
        return self._left > 0

    def advance(self) -> None:
        """Wait for the launched hop and launch the next."""
        assert self.can_advance, "all hops have been launched"
        self.phases_since_launch = 0
        self._resume()

    def wait(self) -> Result:
        """Run all hops that are left and return the result; once."""
        while not self._result:
            self._resume()
        self._left = 0
        return self._result.pop()

    def _resume(self) -> None:
        self._left -= 1
        try:
            next(self._hops)
        except StopIteration as end:
            self._result.append(end.value)


class InFlight:
    """Transfers of a rank that have hops left to launch.

    Between two hops the host has to receive and sort rows, which it cannot do while it computes. The runner of a
    model's phases therefore calls `boundary` after each phase. A transfer launches its next hop once
    `phases_before_next_hop` phases have run since the phase in which its last hop was launched. The ranks of a group
    run the same phases in the same order, so they launch the same hops in the same order, as collective libraries
    require.
    """

    def __init__(self) -> None:
        self._transfers: list[HoppedTransfer[Any]] = []

    def add(self, transfer: HoppedTransfer[Any]) -> None:
        if transfer.can_advance:
            self._transfers.append(transfer)

    def boundary(self) -> None:
        """Count the end of a phase, and launch the hops that are due."""
        for transfer in self._transfers:
            if transfer.can_advance:
                if transfer.phases_since_launch >= transfer.phases_before_next_hop:
                    transfer.advance()
                transfer.phases_since_launch += 1
        self._transfers = [transfer for transfer in self._transfers if transfer.can_advance]
