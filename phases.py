"""Contract between model and pipeline: a chunk's work in phases, each with its own piece of the autograd graph.

A chunk's forward is a generator that yields the name of each phase before running it. The graph is cut at the tensors
that one phase passes to the next. The backward is therefore a generator of the same phases in reverse, and two
micro-batches can be advanced in turn. A cut holds no activation: only gradients cross it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .differentiable import Function, edge_of, run_backward
from .weight_gradients import WeightQueue

Result = TypeVar("Result")

Phases = Generator[str, None, tuple[Tensor | None, Any]]
"""Generator that yields the name of each phase before running it; returns the next stage's input and its own result."""


def run(phases: Generator[str, None, Result], after: Callable[[], None] | None = None) -> Result:
    """Run phases one after another to their result, calling `after` after each."""
    while True:
        try:
            next(phases)
        except StopIteration as end:
            result: Result = end.value
            return result
        if after is not None:
            after()


class Chunk(Protocol):
    """Module of a stage, on one rank."""

    weight_queue: WeightQueue

    def phases(self, micro_batch: Any, x: Tensor | None, tape: Uncut | Tape) -> Phases:
        """Run `micro_batch` on `x`, the previous stage's output (None at the first stage)."""


class Uncut:
    """Tape that cuts nothing: the phases make one graph, for plain autograd or for use without autograd."""

    def phase(self, name: str) -> str:
        return name

    def cut(self, tensor: Tensor, large: bool = False) -> Tensor:
        return tensor

    def leave(self, tensor: Tensor) -> Tensor:
        return tensor

    def seed(self, tensor: Tensor, gradient: float) -> Tensor:
        """Do nothing: under plain autograd the caller sums the losses and starts the backward."""
        return tensor

    def before_backward(self, redo: Callable[[], Iterator[str]]) -> None:
        """Do nothing: plain autograd runs phases again through its saved-tensor hooks."""


class Tape:
    """Pass of one micro-batch through a chunk, cut into pieces at the phases."""

    def __init__(self) -> None:
        self._pieces: list[_Piece | _Redo] = []
        self._open: _Piece | None = None
        # Input of every cut, so that the cut's output requires a gradient; the anchor itself never gets one.
        self._anchor = torch.zeros((), requires_grad=True)
        self._input: _Cut | None = None
        self._output: _Cut | None = None

    def enter(self, tensor: Tensor) -> Tensor:
        """Cut the chunk's input off from the previous stage; `backward` returns its gradient."""
        self._input = _Cut(None)
        return self._continue(tensor, self._input)

    def phase(self, name: str) -> str:
        """Begin the phase `name`, to which all cuts belong until the next phase."""
        self._open = _Piece(name)
        self._pieces.append(self._open)
        return name

    def cut(self, tensor: Tensor, large: bool = False) -> Tensor:
        """Return the same values for later phases, cut off from the graph of this phase.

        The backward of this phase holds the tensor's gradient to its end; a `large` one goes once it has been read.
        """
        if not tensor.requires_grad:
            return tensor
        if not large:
            return self._continue(tensor, self._made(_Cut(edge_of(tensor))))
        cut = _Cut(None)
        cut.ticket = _HandOver.apply(tensor, cut.cell)
        return self._continue(tensor, self._made(cut))

    def leave(self, tensor: Tensor) -> Tensor:
        """Cut the chunk's output off for the next stage; `backward` takes its gradient."""
        self._output = self._made(_Cut(edge_of(tensor)))
        return tensor.detach()

    def seed(self, tensor: Tensor, gradient: float) -> Tensor:
        """Let the backward start from this phase's scalar loss too, with this gradient. Returns the loss's value."""
        if tensor.requires_grad:
            cut = self._made(_Cut(edge_of(tensor)))
            cut.gradient = torch.full_like(tensor, gradient)
        return tensor.detach()

    def before_backward(self, redo: Callable[[], Iterator[str]]) -> None:
        """Let `redo()` yield and run phases again before the backward of the pieces recorded so far."""
        self._pieces.append(_Redo(redo))

    def backward(
        self,
        gradient: Tensor | None,
        queue: WeightQueue,
        deferred: deque[Callable[[], None]] | None,
        until_w: bool = False,
    ) -> Generator[str, None, tuple[Tensor | None, None]]:
        """Run the phases in reverse, each named before its piece runs; returns the gradient of the chunk's input.

        `gradient` is the gradient of the chunk's output. Weight gradients go to `deferred`, or are computed at once if
        None; `until_w` as in `WeightQueue.into`. Every piece is freed as soon as it has run.
        """
        if self._output is not None:
            self._output.gradient = gradient
        self._open = None
        del gradient
        while self._pieces:
            piece = self._pieces.pop()
            if isinstance(piece, _Redo):
                yield from piece.run()
                continue
            yield piece.name
            outer = queue.aim(deferred, until_w)
            try:
                piece.backward()
            finally:
                queue.restore(outer)
            del piece
        return (None if self._input is None else self._input.gradient), None

    def _made(self, cut: _Cut) -> _Cut:
        assert self._open is not None, "a chunk names a phase before it cuts anything"
        self._open.cuts.append(cut)
        return cut

    def _continue(self, tensor: Tensor, cut: _Cut) -> Tensor:
        result: Tensor = _Cross.apply(self._anchor, tensor.detach(), cut)
        return result


class _Cut:
    """Cut of the graph at a tensor: the edge to its operation, and the gradient that arrived from its users."""

    def __init__(self, edge: GradientEdge | None) -> None:
        self.edge = edge
        self.gradient: Tensor | None = None
        self.ticket: Tensor | None = None
        """Output of `_HandOver`, from which the backward starts in place of the tensor."""
        self.cell: list[Tensor] = []
        """Place from which `_HandOver` takes the gradient; its node holds no cut, or neither would ever be freed."""

    def root(self) -> tuple[GradientEdge | Tensor, Tensor] | None:
        """Edge or ticket from which the backward starts, and the gradient there; None if no gradient has arrived."""
        ticket, self.ticket = self.ticket, None
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            return None
        if ticket is not None:
            self.cell.append(gradient)
            return ticket, ticket.detach()
        assert self.edge is not None
        return self.edge, gradient


class _Cross(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor, cut: _Cut) -> Tensor:
        ctx.cut = cut
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        cut: _Cut = ctx.cut  # several pieces may use the same tensor
        cut.gradient = gradients[0] if cut.gradient is None else cut.gradient + gradients[0]
        return None, None, None


class _HandOver(Function):
    """A scalar without meaning, in whose backward the gradient of the cut moves on, so that nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cell: list[Tensor]) -> Tensor:
        ctx.cell = cell
        return tensor.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        cell: list[Tensor] = ctx.cell
        return cell.pop(), None


class _Piece:
    def __init__(self, name: str) -> None:
        self.name = name
        self.cuts: list[_Cut] = []

    def backward(self) -> None:
        roots = [root for cut in self.cuts if (root := cut.root()) is not None]
        self.cuts.clear()
        if roots:
            starts, gradients = zip(*roots, strict=True)
            del roots
            run_backward(starts, gradients)


class _Redo:
    def __init__(self, run: Callable[[], Iterator[str]]) -> None:
        self.run = run
