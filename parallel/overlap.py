"""The overlap engine: the forward of one micro-batch and the backward of another, advanced in turn.

Each is a generator of phases that launches its communication and waits only where it needs the result, so whatever
the other one computes in between hides it. Weight gradients wait in a queue and fill the gaps that are left. The order
is data: another order is another tuple.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

from ..phases import drain
from ..settings import UsageError

Result = TypeVar("Result")

V3 = (
    # The order inside a layer pair that DeepSeek's published trace shows (V3 Figure 4), with every transfer launched
    # as soon as what it carries is there. In the comments, what travels while the phase computes.
    "B.finish",  # sends gradients to the experts: combine(B)
    "W",  # combine(F) of the layer before, combine(B)
    "F.finish",
    "F.attention",  # combine(B)
    "F.dispatch",
    "B.redo.attention",  # with full recompute: combine(B), dispatch(F)
    "B.redo.dispatch",
    "B.combine",
    "B.experts",  # dispatch(F); its end sends the gradients back: dispatch(B)
    "B.shared",  # dispatch(F), dispatch(B)
    "W",
    "F.shared",
    "F.experts",  # dispatch(B), or with full recompute the dispatch that is repeated
    "F.combine",
    "B.redo.shared",  # with full recompute these could not run before
    "B.redo.experts",
    "B.combine",
    "B.experts",
    "B.shared",
    "W",
    "B.dispatch",
    "B.attention",  # combine(F)
)

ORDERS: dict[str, tuple[str, ...]] = {"v3": V3, "sequence": ()}
"""Orders by name. The empty one runs the whole forward and then the whole backward."""


def find_order(order: str | Sequence[str]) -> tuple[str, ...]:
    """The order of that name, or the given one; raises UsageError for one that cannot be."""
    if isinstance(order, str):
        if order not in ORDERS:
            raise UsageError(f"there is no overlap order {order!r}; there are {', '.join(ORDERS)}, or a list of phases")
        return ORDERS[order]
    for entry in order:
        if entry != "W" and entry[:2] not in ("F.", "B."):
            raise UsageError(
                f"{entry!r} in the overlap order is neither W nor a phase such as F.attention or B.experts"
            )
    return tuple(order)


class Side(Generic[Result]):
    """One of the two generators, and the phase it has named but not run."""

    def __init__(self, phases: Generator[str, None, Result]) -> None:
        self._phases = phases
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

    @property
    def result(self) -> Result:
        assert self._result, f"phase {self.upcoming} has not run"
        return self._result[0]


Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


def run_pair(
    forward: Generator[str, None, Forward],
    backward: Generator[str, None, Backward],
    weights: deque[Callable[[], None]],
    order: Sequence[str],
) -> tuple[Forward, Backward]:
    """Run both to their ends in the given order, over and over; returns their results.

    An entry runs its phase if that is the side's upcoming one, and is passed over otherwise. Phases that the order
    does not name run where their side is next looked at. `W` drains `weights`.
    """
    sides: dict[str, Side[Forward] | Side[Backward]] = {"F": Side(forward), "B": Side(backward)}
    known = {name: {entry[2:] for entry in order if entry.startswith(f"{name}.")} for name in sides}
    progress = True
    while progress:
        progress = False
        for entry in order:
            if entry == "W":
                drain(weights)
                continue
            name, _, phase = entry.partition(".")
            side = sides[name]
            while side.upcoming is not None and side.upcoming not in known[name]:
                side.advance()
                progress = True
            if side.upcoming == phase:
                side.advance()
                progress = True
    for side in sides.values():  # what the order leaves over
        while side.upcoming is not None:
            side.advance()
    return sides["F"].result, sides["B"].result  # type: ignore[return-value]
