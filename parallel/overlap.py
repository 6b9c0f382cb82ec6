"""The overlap engine: the forward of one micro-batch and the backward of another, advanced in turn.

Each side is a generator of phases. It launches its communication and waits only where the result is needed, so the
other side's computation in between hides the transfer. Weight gradients wait in a queue and fill the remaining gaps.
The order is data: another order is another tuple.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from ..weight_gradients import drain

Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


class Side:
    """One generator of the pair, the phase that it has named but not run, and at the end its result."""

    def __init__(self, phases: Generator[str, None, Any], after: Callable[[], None] | None) -> None:
        self._phases, self._after = phases, after
        self.upcoming: str | None = None
        self.result: Any = None
        self.advance()

    def advance(self) -> None:
        """Run the upcoming phase."""
        try:
            self.upcoming = next(self._phases)
        except StopIteration as end:
            self.upcoming, self.result = None, end.value
        if self._after is not None:
            self._after()


def run_pair(
    forward: Generator[str, None, Forward],
    backward: Generator[str, None, Backward],
    weight_gradients: deque[Callable[[], None]],
    order: Sequence[str],
    after: Callable[[], None] | None = None,
) -> tuple[Forward, Backward]:
    """Run both to their ends in the given order, over and over; returns their results.

    An entry runs its phase if the phase is its side's upcoming one; otherwise the entry is skipped. A phase that the
    order does not name runs at the next entry of its side. `W` drains `weight_gradients`. `after` is called after each
    phase.
    """
    sides = {"F": Side(forward, after), "B": Side(backward, after)}
    named = {name: {entry[2:] for entry in order if entry.startswith(f"{name}.")} for name in sides}
    progress = True
    while progress:
        progress = False
        for entry in order:
            if entry == "W":
                drain(weight_gradients)
                continue
            name, _, phase = entry.partition(".")
            side = sides[name]
            while side.upcoming is not None and side.upcoming not in named[name]:
                side.advance()
                progress = True
            if side.upcoming == phase:
                side.advance()
                progress = True
    for side in sides.values():  # phases that the order leaves over
        while side.upcoming is not None:
            side.advance()
    return sides["F"].result, sides["B"].result
