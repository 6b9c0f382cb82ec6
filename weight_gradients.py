"""Contract between layers, pipeline and optimizer: gradients of weights that are computed later (W)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn


class GradientSink(Protocol):
    """FP32 sums of parameters' gradients, as an optimizer keeps them. A layer gets a buffer once, and keeps it."""

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        """Buffer in which gradients of `parameter` are added up, FP32, in its shape."""

    def arrived(self, parameter: nn.Parameter) -> None:
        """Report that one more gradient of `parameter` has been added to the buffer."""


class WeightQueue:
    """Queue of weight gradients that are computed later (W), first in, first out.

    Linear layers read `deferring` in their backward. While the queue defers, they compute only the gradient of their
    input and `put` the gradient of their weight here, where it waits until the target list is drained.
    """

    def __init__(self) -> None:
        self._target: deque[Callable[[], None]] | None = None

    @property
    def deferring(self) -> bool:
        return self._target is not None

    def put(self, work: Callable[[], None]) -> None:
        assert self._target is not None, "weight gradients are not deferred now"
        self._target.append(work)

    @contextmanager
    def into(self, target: deque[Callable[[], None]] | None) -> Iterator[None]:
        """Context in which weight gradients go to `target`; None computes them at once."""
        outer, self._target = self._target, target
        try:
            yield
        finally:
            self._target = outer


def now_or_later(queue: WeightQueue | None, work: Callable[[], None]) -> None:
    """Run `work` at once, or put it into the queue if the queue is deferring; called within a backward."""
    if queue is not None and queue.deferring:
        queue.put(work)
    else:
        work()


def drain(work: deque[Callable[[], None]]) -> None:
    """Run deferred weight gradients in the order in which they were put."""
    while work:
        work.popleft()()
