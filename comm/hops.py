"""Transfers of one hop or several, advanced by explicit calls, without extra threads."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
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
        between: context for the work between two hops. On a GPU it is a stream of its own, so that the work that is
            launched later does not stand behind the first hop.
    """

    def __init__(
        self,
        hops: Hops[Result],
        count: int = 1,
        phases_before_next_hop: int = 1,
        between: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._hops = hops
        self._left = count
        self._between = between
        self._result: list[Result] = []
        self.phases_before_next_hop = phases_before_next_hop
        self.phases_since_launch = 0
        self._resume(nullcontext())

    @property
    def can_advance(self) -> bool:
        """Whether there are hops left to launch."""
        return self._left > 0

    def advance(self) -> None:
        """Wait for the launched hop and launch the next."""
        assert self.can_advance, "all hops have been launched"
        self.phases_since_launch = 0
        self._resume(self._between())

    def wait(self) -> Result:
        """Run all hops that are left and return the result; once."""
        while not self._result:
            self._resume(self._between() if self.can_advance else nullcontext())
        self._left = 0
        return self._result.pop()

    def _resume(self, context: AbstractContextManager[object]) -> None:
        self._left -= 1
        try:
            with context:
                next(self._hops)
        except StopIteration as end:
            self._result.append(end.value)


class InFlight:
    """Transfers of a rank that have hops left to launch.

    Between two hops on CPUs the host has to receive and sort rows, which it cannot do while it computes. The runner of
    a model's phases therefore calls `boundary` after each phase. A transfer launches its next hop once
    `phases_before_next_hop` phases have run since the phase in which its last hop was launched. The ranks of a group
    run the same phases in the same order, so they launch the same hops in the same order, as collective libraries
    require.
    """

    def __init__(self) -> None:
        self._transfers: list[HoppedTransfer[Any]] = []

    def add(self, transfer: HoppedTransfer[Any]) -> None:
        """Take a transfer in, to be advanced by `boundary`."""
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
