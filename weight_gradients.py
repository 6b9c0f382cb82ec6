"""Contract between layers, pipeline and optimizer: sums of weight gradients, and gradients computed later (W)."""

from __future__ import annotations

import weakref
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


class GradientSum:
    """FP32 sum of one parameter's gradients over a step.

    A layer's backward adds to the sum instead of giving autograd a gradient: each gradient through autograd costs a
    tensor, a hand-over between threads and a call of the optimizer's hook.
    """

    __slots__ = ("__weakref__", "_parts", "arrived", "buffer")

    def __init__(self, buffer: Tensor, arrived: Callable[[], None]) -> None:
        """`buffer` has the parameter's shape; `arrived` is called after each gradient that has been added to it."""
        self.buffer = buffer
        self.arrived = arrived
        self._parts: tuple[Tensor, ...] | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Views of the buffer along its first dimension, made once: the sums of stacked matrices."""
        if self._parts is None:
            self._parts = self.buffer.unbind()
        return self._parts

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of any format, with as many elements as the parameter."""
        self.buffer.add_(gradient.view_as(self.buffer))
        self.arrived()


_ATTRIBUTE = "_counterflow_gradient_sum"
_plain_passes = 0


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Context of forwards whose gradients all go to autograd, also where an optimizer keeps sums."""
    global _plain_passes
    _plain_passes += 1
    try:
        yield
    finally:
        _plain_passes -= 1


def keeps_sums() -> bool:
    """Whether the backward of a forward that runs now may add to the optimizer's sums; False in `plain_autograd`."""
    return not _plain_passes


def attach_sum(parameter: nn.Parameter, total: GradientSum) -> None:
    """Let `sink_of` find the sum, as long as its owner keeps it."""
    setattr(parameter, _ATTRIBUTE, weakref.ref(total))


def sink_of(parameter: Tensor) -> GradientSum | None:
    """Sum to which the backward of a forward that runs now adds the gradient of `parameter`.

    None without an optimizer, in `plain_autograd` and for a frozen parameter: autograd then has the gradient.
    """
    reference: Callable[[], GradientSum | None] | None = getattr(parameter, _ATTRIBUTE, None)
    return None if reference is None or _plain_passes or not parameter.requires_grad else reference()


def seen_by_autograd(parameter: Tensor, total: GradientSum | None, x: Tensor) -> Tensor:
    """Parameter as an operand of autograd's: if its gradient goes to a sum, and x leads autograd to the operation,
    autograd need not know it."""
    return parameter.detach() if total is not None and x.requires_grad else parameter


Target = deque[Callable[[], None]] | None
"""Queue of weight gradients that wait; None computes them at once."""


class WeightQueue:
    """Queue of weight gradients that are computed later (W), first in, first out.

    Linear layers read `deferring` in their backward. While the queue defers, they compute only the gradient of their
    input and `put` the gradient of their weight here, where it waits until the target list is drained.

    `of_pairs` is the queue of layers with much to hold and little to compute: it defers to the end of a pair, and never
    to a W action, which may come much later.
    """

    def __init__(self, of_pairs: WeightQueue | None = None) -> None:
        self.of_pairs = of_pairs or self
        self._target: deque[Callable[[], None]] | None = None

    @property
    def deferring(self) -> bool:
        return self._target is not None

    def put(self, work: Callable[[], None]) -> None:
        assert self._target is not None, "weight gradients are not deferred now"
        self._target.append(work)

    @contextmanager
    def into(self, target: deque[Callable[[], None]] | None, until_w: bool = False) -> Iterator[None]:
        """Context in which weight gradients go to `target`; None computes them at once.

        `until_w` says that the target is drained by a W action, so that the layers of `of_pairs` do not defer.
        """
        outer = self.aim(target, until_w)
        try:
            yield
        finally:
            self.restore(outer)

    def aim(self, target: Target, until_w: bool = False) -> tuple[Target, Target]:
        """Let weight gradients go to `target`, as in `into`; returns what `restore` needs."""
        pairs = self.of_pairs
        outer = self._target, pairs._target
        self._target = target
        if pairs is not self:
            pairs._target = None if until_w else target
        return outer

    def restore(self, outer: tuple[Target, Target]) -> None:
        """Let weight gradients go where they went before `aim`."""
        self._target = outer[0]
        if self.of_pairs is not self:
            self.of_pairs._target = outer[1]


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
