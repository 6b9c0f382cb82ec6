"""The eight phases that a rank of DualPipe and of DualPipeV goes through (github.com/deepseek-ai/DualPipe).

A rank serves two streams of micro-batches, each at a separate stage: the near stream (0) reaches the rank on its way to
the turn, the far stream (1) comes back from there. The turn is the middle of the pipeline in DualPipe, where the
streams of both ends meet, and the last rank in DualPipeV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from .actions import Action, Kind, Overlap, Schedule, parts
from .place_weight_gradients import place_weight_gradients

Stream = Literal[0, 1]
MISSING = -1
"""Placeholder for a micro-batch of a full stream that this step does not have."""


class Streams:
    """Next actions of a rank in each of its two streams, with one method for each kind of step."""

    def __init__(self, stages: tuple[int, int], microbatches: tuple[Sequence[int], Sequence[int]]) -> None:
        self.stages, self.microbatches = stages, microbatches
        self.next_forward, self.next_backward = [0, 0], [0, 0]
        self.weight_gradients_left: deque[Action] = deque()

    def forward(self, stream: Stream) -> Action:
        return self._next("F", stream, self.next_forward)

    def backward(self, stream: Stream) -> Action:
        return self._next("B", stream, self.next_backward)

    def backward_input(self, stream: Stream) -> Action:
        """The backward for the input alone, for which the previous rank waits."""
        action = self._next("I", stream, self.next_backward)
        self.weight_gradients_left.append(action._replace(kind="W"))
        return action

    def weight_gradients(self) -> Action:
        """The weight gradients that have waited longest."""
        return self.weight_gradients_left.popleft()

    def pair(self, forward: Stream, backward: Stream) -> Overlap:
        return Overlap(self.forward(forward), self.backward(backward))

    def _next(self, kind: Kind, stream: Stream, counters: list[int]) -> Action:
        index = counters[stream]
        counters[stream] += 1
        return Action(kind, self.stages[stream], self.microbatches[stream][index])


def eight_phases(way: int, depth: int, do: Streams) -> Iterator[Action | Overlap]:
    """The order of the rank `depth` ranks from its end; a stream's way, from its end to the turn, has `way` ranks."""
    to_turn = way - depth - 1
    length = len(do.microbatches[0])

    for _ in range(2 * to_turn):  # 1: nF0
        yield do.forward(0)

    for _ in range(depth + 1):  # 2: nF0F1
        yield do.forward(0)
        yield do.forward(1)

    for _ in range(to_turn):  # 3: nI1W1F1
        yield do.backward_input(1)
        yield do.weight_gradients()
        yield do.forward(1)

    # The forwards of stream 0 that the phases 1 and 2 left: length - 2 * to_turn - (depth + 1).
    for i in range(length - 2 * way + depth + 1):  # 4: nF0B1F1B0, the main phase
        if i == 0 and to_turn == 0:
            # At the turn both halves would wait for each other's sender: run one after the other they end sooner.
            yield do.forward(0)
            yield do.backward(1)
        else:
            yield do.pair(0, 1)
        yield do.pair(1, 0)

    for _ in range(to_turn):  # 5: nB1F1B0
        yield do.backward(1)
        yield do.pair(1, 0)

    # The first depth + 1 are whole, the others leave their W for the phases 7 and 8.
    for i in range(2 * (depth + 1)):  # 6: nB1B0
        stream: Stream = 0 if i % 2 else 1
        yield do.backward(stream) if i <= depth else do.backward_input(stream)

    for _ in range(to_turn):  # 7: nWI0
        yield do.weight_gradients()
        yield do.backward_input(0)

    for _ in range(depth + 1):  # 8: nW
        yield do.weight_gradients()


def padded(microbatches: range, length: int) -> Sequence[int]:
    """A stream filled up to `length` with missing micro-batches, which come last.

    Eight phases need streams of at least two micro-batches per rank of their way, both of one length.
    """
    return [*microbatches, *[MISSING] * (length - len(microbatches))]


def adapt(schedule: Schedule, way: int, defer_weights: bool) -> Schedule:
    """The schedule of all eight phases without its missing micro-batches, or with the W outside the pairs.

    An order that can run can also run without some micro-batches, but has gaps where the full order has work. Every
    backward outside a pair therefore becomes an I, and its W goes where a rank waits in a simulation. A full schedule
    without `defer_weights` is returned unchanged.
    """
    missing = any(part.microbatch == MISSING for _, _, part in schedule.work())
    if not missing and not defer_weights:
        return schedule
    order = tuple(tuple(_without_w(actions, defer_weights)) for actions in schedule.actions)
    # If pairs keep their W, few W are left, and a W that begins late throws the ranks out of step: in a gap below half
    # a W, 0.5 at the nominal costs, it would delay its rank by more than it fills. With `defer_weights` a W is always
    # left to do, and no rank needs to wait.
    max_wait = 0.0 if defer_weights else 0.5
    return place_weight_gradients(replace(schedule, actions=order), live_limit=2 * way + 1, max_wait=max_wait)


def _without_w(actions: Sequence[Action | Overlap], defer_weights: bool) -> Iterator[Action | Overlap]:
    for action in actions:
        present = [part for part in parts(action) if part.microbatch != MISSING and part.kind != "W"]
        if len(present) == 2:
            forward, backward = present
            yield Overlap(forward, backward._replace(kind="I") if defer_weights else backward)
        elif present:
            (alone,) = present
            yield alone._replace(kind="I") if alone.kind == "B" else alone
