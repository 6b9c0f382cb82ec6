"""Dispatch and combine as autograd sees them, whatever way the rows take.

Each direction is two autograd Functions, a start that launches and a wait that waits, joined by a scalar ticket:

    forward    start: launch -> ticket -> wait: wait
    backward   start: wait   <- ticket <- wait: launch

so no tensor that is still being received is ever visible to autograd, its hooks or its anomaly mode.

The Functions keep their indices on the shared route and save no tensors: an index is a fraction of a percent of the
row it moves, dispatch and combine share them, and as combine saves nothing, a checkpointed layer that ends with it is
recomputed only up to the last tensor its experts saved: the rows are not sent back a second time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..fp8.quantize import BlockQuantized
from ..settings import UsageError
from .dispatcher import Dispatched, Incoming, Pending
from .hops import HoppedTransfer, Hops, InFlight
from .meter import GroupMeter, Meter
from .wire import PlainWire, Rows, WireFormat

Way = Literal["out", "home"]


class Arrived(NamedTuple):
    """What a route's dispatch brings."""

    rows: Tensor
    """[R, H] in the order of `Dispatched`, with rows of zeros where they are aligned."""
    weights: Tensor
    """FP32 [R]"""
    codes: BlockQuantized | None


class Returned(NamedTuple):
    """What the backward of dispatch brings; None where nobody asked."""

    x: Tensor | None
    """[T, H]"""
    weights: Tensor | None
    """FP32 [T, K], zero for slots that were sent nowhere."""


class HoppingRoute(Protocol):
    """Where the tokens of one dispatch go, and the four ways along it. Made when the experts are chosen.

    `tokens_per_expert` and `offsets`, as in `Dispatched`, are there once the counts are.
    """

    tokens_per_expert: list[int]
    offsets: Tensor

    def complete(self) -> None:
        """Wait for the counts; `dispatch` does so by itself."""

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        """x [T, H], weights FP32 [T, K], to the experts."""

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        """Gradients of the rows [R, H] and of their weights FP32 [R], back to the tokens and summed there."""

    def combine(self, y: Tensor) -> Hops[Tensor]:
        """y [R, H], back to the tokens and summed there: [T, H]."""

    def combine_backward(self, grad: Tensor) -> Hops[Rows]:
        """The gradient of each token [T, H], to its experts: [R, H]."""


class RoutedDispatcher(ABC):
    """What dispatchers have in common; see `Dispatcher`. Each makes routes of its own.

    Rank r of the group holds the experts r E_local to (r + 1) E_local - 1.

    Args:
        group: the expert parallel group. None is this process by itself; then, and in a group of one rank, nothing is
            communicated.
        num_experts: E, routed experts of the layer over the whole group.
        alignment: each expert's rows are filled up with zeros to a multiple of it. Matrix products in FP8 want that,
            and here it costs nothing: the rows are moved to their places anyhow.
        wire: what transfers to the experts.
        meter: counts what is sent.
        underway: advances what takes several hops.

    Raises:
        UsageError: the group does not divide the experts.
    """

    hops = 1
    """All-to-alls, one after another, of each way."""
    phases_before_next_hop: Mapping[Way, int] = {"out": 1, "home": 1}
    """See `HoppedTransfer`, for ways to the experts and back."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_experts: int,
        alignment: int = 1,
        wire: WireFormat | None = None,
        meter: Meter | None = None,
        underway: InFlight | None = None,
    ) -> None:
        size = 1 if group is None else group.size()
        if num_experts % size:
            fits = [ep for ep in range(1, num_experts + 1) if num_experts % ep == 0]
            raise UsageError(
                f"{num_experts} experts cannot be shared evenly by an expert parallel group of {size} ranks; "
                f"parallel.ep can be one of {fits}"
            )
        self.group = group
        self.num_experts = num_experts
        self.alignment = alignment
        self.wire = wire or PlainWire()
        self.meter: GroupMeter | None = None if meter is None else meter.group(group)
        self.underway = underway or InFlight()

    @abstractmethod
    def begin_route(self, expert_ids: Tensor) -> HoppingRoute:
        """Launch the exchange of counts."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds beside memory, at the end of a run that went well; every rank of the group does."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        return self.begin_dispatch(x, expert_ids, weights).wait()

    def begin_dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, route: HoppingRoute | None = None
    ) -> Pending[Dispatched]:
        assert x.shape[0] == expert_ids.shape[0], f"{x.shape[0]} tokens but expert ids for {expert_ids.shape[0]}"
        assert weights.shape == expert_ids.shape, f"weights {weights.shape} for expert ids {expert_ids.shape}"
        assert weights.dtype == torch.float32, f"gate weights are FP32, not {weights.dtype}"
        passage = _Passage(route or self.begin_route(expert_ids), self)
        ticket = _DispatchStart.apply(x, weights, passage)
        return Pending(ticket, lambda ticket: _finish_dispatch(ticket, passage))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.begin_combine(y, dispatched).wait()

    def begin_combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        route = dispatched.handle
        rows = sum(route.tokens_per_expert)
        assert y.shape[0] == rows, f"{y.shape[0]} rows to combine, {rows} were dispatched"
        passage = _Passage(route, self, dispatched.incoming)
        ticket = _CombineStart.apply(y, passage)
        return Pending(ticket, lambda ticket: _CombineWait.apply(ticket, passage))


class _Passage:
    """What a start and its wait share: the route, and what is under way in this direction of this pass."""

    def __init__(self, route: HoppingRoute, dispatcher: RoutedDispatcher, incoming: Incoming | None = None) -> None:
        self.route = route
        self.incoming = incoming or Incoming()
        self.needs_grad: tuple[bool, ...] = ()
        self.codes: BlockQuantized | None = None
        self._dispatcher = dispatcher
        self._transfer: HoppedTransfer[Any] | None = None

    def begin(self, way: Way, hops: Hops[Any]) -> None:
        self._transfer = HoppedTransfer(hops, self._dispatcher.hops, self._dispatcher.phases_before_next_hop[way])
        self._dispatcher.underway.add(self._transfer)

    def wait(self) -> Any:
        assert self._transfer is not None, "waited twice for one transfer"
        transfer, self._transfer = self._transfer, None
        return transfer.wait()


def _ticket(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


class _DispatchStart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, passage: _Passage) -> Tensor:
        passage.begin("out", passage.route.dispatch(x, weights))
        passage.needs_grad = ctx.needs_input_grad[:2]
        ctx.passage = passage
        return _ticket(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        returned: Returned = ctx.passage.wait()
        return returned.x, returned.weights, None


class _DispatchWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, passage: _Passage) -> tuple[Tensor, Tensor]:
        arrived: Arrived = passage.wait()
        passage.codes = arrived.codes
        outputs = arrived.rows, arrived.weights
        constant = [out for out, needs_grad in zip(outputs, passage.needs_grad, strict=True) if not needs_grad]
        ctx.mark_non_differentiable(*constant)
        ctx.passage = passage
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor) -> tuple[Tensor, None]:
        passage = ctx.passage
        rows_need_it, weights_need_it = passage.needs_grad
        hops = passage.route.dispatch_backward(
            grad_rows if rows_need_it else None, grad_row_weights if weights_need_it else None
        )
        passage.begin("home", hops)
        return _ticket(grad_rows), None


def _finish_dispatch(ticket: Tensor, passage: _Passage) -> Dispatched:
    route = passage.route
    rows, row_weights = _DispatchWait.apply(ticket, passage)
    codes, passage.codes = passage.codes, None
    return Dispatched(rows, row_weights, route.offsets, route.tokens_per_expert, route, codes)


class _CombineStart(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, passage: _Passage) -> Tensor:
        passage.begin("home", passage.route.combine(y))
        ctx.passage = passage
        return _ticket(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        arrived: Rows = ctx.passage.wait()
        ctx.passage.incoming.codes = arrived.codes
        return arrived.values, None


class _CombineWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, passage: _Passage) -> Tensor:
        out: Tensor = passage.wait()
        ctx.passage = passage
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.passage.begin("out", ctx.passage.route.combine_backward(grad))
        return _ticket(grad), None
