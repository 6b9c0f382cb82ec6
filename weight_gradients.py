"""The contract between layers, pipeline and optimizer: gradients of weights that are computed later (W)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn


class GradientSink(Protocol):
    """Adds up the gradients of parameters in FP32: an optimizer. It is asked once, and the buffers stay."""

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        """Where gradients of `parameter` are added up, FP32, in its shape."""

    def arrived(self, parameter: nn.Parameter) -> None:
        """One more of its gradients has been added to the buffer."""


class WeightQueue:
    """Gradients of weights that were left for later (W), first in, first out.

    Linear layers ask `deferring` in their backward. While it is set they compute the gradient of their input alone and
    `put` the rest here, where it lies until the target list is drained.
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
        """Within it, weight gradients go to `target`; None computes them at once."""
        before, self._target = self._target, target
        try:
            yield
        finally:
            self._target = before


def now_or_later(queue: WeightQueue | None, work: Callable[[], None]) -> None:
    """Run `work` in the midst of a backward, or put it off if the queue does so now."""
    if queue is not None and queue.deferring:
        queue.put(work)
    else:
        work()


def drain(work: deque[Callable[[], None]]) -> None:
    """Run deferred weight gradients in the order in which they were put."""
    while work:
        work.popleft()()
