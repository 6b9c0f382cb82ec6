"""The overlap engine: the forward of one micro-batch and the backward of another, advanced in turn.

Each is a generator of phases that launches its communication and waits only where it needs the result, so the other
one's computation in between hides the transfer. Weight gradients wait in a queue and fill the remaining gaps. The order
is data: another order is another tuple.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

from ..weight_gradients import drain

Result = TypeVar("Result")


class Side(Generic[Result]):
    """A generator of the pair, and the phase that it has named but not run."""

    def __init__(self, phases: Generator[str, None, Result], after: Callable[[], None] | None) -> None:
        self._phases = phases
        self._after = after
        self._result: list[Result] = []
        self.upcoming: str | None = None
        self.advance()

    def advance(self) -> None:
        """Run the upcoming phase."""
        try:
            self.upcoming = next(self._phases)
        except StopIteration as end:
            self.upcoming = None
            self._result.append(end.value)
        if self._after is not None:
            self._after()

    @property
    def result(self) -> Result:
        assert self._result, f"phase {self.upcoming} has not run"
        return self._result[0]


Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


def run_pair(
    forward: Generator[str, None, Forward],
    backward: Generator[str, None, Backward],
    weight_gradients: deque[Callable[[], None]],
    order: Sequence[str],
    after: Callable[[], None] | None = None,
) -> tuple[Forward, Backward]:
    """Run both to their ends in the given order, over and over; returns their results.

    An entry runs its phase if that is the side's upcoming one, and is skipped otherwise. A phase that the order does
    not name runs at the next entry of its side. `W` drains `weight_gradients`. `after` is called after each phase.
    """
    sides: dict[str, Side[Forward] | Side[Backward]] = {"F": Side(forward, after), "B": Side(backward, after)}
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
    return sides["F"].result, sides["B"].result  # type: ignore[return-value]
