"""Autograd of dispatch and combine, for any route of the rows.

Each direction is two autograd Functions joined by a scalar ticket, one that launches and one that waits:

    forward    start: launch -> ticket -> wait: wait
    backward   start: wait   <- ticket <- wait: launch

Autograd, its hooks and its anomaly mode therefore never meet a tensor that is still being received.

The Functions keep their indices on the shared route and save no tensors. An index takes a fraction of a percent of the
memory of the row that it moves, and dispatch and combine share the indices. Combine saves nothing, so a checkpointed
layer that ends with combine is recomputed only up to the last tensor that its experts saved: the rows are not sent back
a second time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..differentiable import Function, once_differentiable
from ..fp8.quantize import BlockQuantized
from ..settings import UsageError
from .dispatcher import Dispatched, Incoming, Pending
from .exchange import Exchange
from .hops import HoppedTransfer, Hops, InFlight
from .meter import GroupMeter, Meter
from .steps.branch import takes_fused_kernels
from .streams import beside
from .wire import Decoded, PlainWire, WireFormat

Way = Literal["to experts", "to tokens"]


class Arrived(NamedTuple):
    """Result of a route's dispatch."""

    rows: Tensor
    """[R, H] in the order of `Dispatched`, with rows of zeros where they are aligned."""
    weights: Tensor
    """FP32 [R]"""
    codes: BlockQuantized | None


class Returned(NamedTuple):
    """Gradients that the backward of dispatch returns; None where not needed."""

    x: Tensor | None
    """[T, H]"""
    weights: Tensor | None
    """FP32 [T, K], zero for slots that were sent nowhere."""


class HoppingRoute(Protocol):
    """Route of the tokens of one dispatch, with its four transfers. It is made when the experts are chosen.

    `tokens_per_expert` and `offsets`, as in `Dispatched`, are set once the counts have arrived.
    """

    tokens_per_expert: list[int]
    offsets: Tensor

    def complete(self) -> None:
        """Wait for the counts; `dispatch` calls it."""

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        """Send x [T, H] and weights FP32 [T, K] to the experts."""

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        """Return gradients of the rows [R, H] and of their weights FP32 [R] to the tokens, and sum them there."""

    def combine(self, y: Tensor) -> Hops[Tensor]:
        """Return y [R, H] to the tokens, and sum it there: [T, H]."""

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        """Send the gradient of each token [T, H] to its experts: [R, H]."""


@dataclass(frozen=True)
class DispatchOptions:
    """Options that all dispatchers share.

    alignment: multiple to which each expert's rows are filled up with zeros. Matrix products in FP8 need one. Filling
        up costs nothing here, as the rows are sorted anyhow.
    wire: format of the rows that are sent to the experts.
    meter: counts what is sent.
    in_flight: advances transfers of several hops.
    counts: group of the same ranks for the exchange of counts, which would else queue behind tokens; by default the
        tokens' own.
    """

    alignment: int = 1
    wire: WireFormat = field(default_factory=PlainWire)
    meter: Meter | None = None
    in_flight: InFlight = field(default_factory=InFlight)
    counts: dist.ProcessGroup | None = None


class RoutedDispatcher(ABC):
    """Common part of the dispatchers; see `Dispatcher`. A subclass makes its own kind of route.

    Rank r of the group holds the experts r E_local to (r + 1) E_local - 1.

    Args:
        group: the expert parallel group. None is this process alone; then, and in a group of one rank, nothing is
            communicated.
        num_experts: E, routed experts of the layer over the whole group.
        options: see `DispatchOptions`.

    Raises:
        UsageError: the group does not divide the experts.
    """

    hops = 1
    """Number of all-to-alls that a transfer makes, one after another."""
    phases_before_next_hop: Mapping[Way, int] = {"to experts": 1, "to tokens": 1}
    """Phases before the next hop of a transfer, see `HoppedTransfer`, by direction."""

    def __init__(
        self, group: dist.ProcessGroup | None, num_experts: int, options: DispatchOptions | None = None
    ) -> None:
        size = 1 if group is None else group.size()
        if num_experts % size:
            fits = [ep for ep in range(1, num_experts + 1) if num_experts % ep == 0]
            raise UsageError(
                f"{num_experts} experts cannot be shared evenly by an expert parallel group of {size} ranks; "
                f"parallel.ep can be one of {fits}"
            )
        self.group, self.size = group, size
        self.num_experts = num_experts
        self.options = options or DispatchOptions()
        meter = self.options.meter
        self.meter: GroupMeter | None = None if meter is None else meter.group(group)

    @abstractmethod
    def begin_route(self, expert_ids: Tensor) -> HoppingRoute:
        """Launch the exchange of counts."""

    def send_counts(self, counts: Tensor, send: list[int], receive: list[int], into: Tensor | None = None) -> Exchange:
        """Launch the exchange of the numbers of rows that follow."""
        return Exchange(counts, send, receive, self.options.counts or self.group, self.meter, "counts", into)

    def read_counts(self, counts: Tensor) -> list[Any]:
        """Numbers of rows on the host; the only wait for the device. A dry run puts its own function in place."""
        numbers: list[Any] = counts.tolist()
        return numbers

    def synchronise(self) -> None:  # noqa: B027 - most dispatchers wait as long as the group does
        """Wait for the ranks of the group before the first dispatch, and after pauses of any length in training."""

    def close(self) -> None:  # noqa: B027 - most dispatchers hold nothing
        """Release resources other than Python's memory after a successful run; every rank of the group calls it."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        return self.begin_dispatch(x, expert_ids, weights).wait()

    def begin_dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, route: HoppingRoute | None = None
    ) -> Pending[Dispatched]:
        assert x.shape[0] == expert_ids.shape[0], f"{x.shape[0]} tokens but expert ids for {expert_ids.shape[0]}"
        assert weights.shape == expert_ids.shape, f"weights {weights.shape} for expert ids {expert_ids.shape}"
        assert weights.dtype == torch.float32, f"gate weights are FP32, not {weights.dtype}"
        shared = _SharedState(route or self.begin_route(expert_ids), self)
        ticket = _DispatchStart.apply(x, weights, shared)
        return Pending(ticket, lambda ticket: _finish_dispatch(ticket, shared))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.begin_combine(y, dispatched).wait()

    def begin_combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        route = dispatched.handle
        rows = sum(route.tokens_per_expert)
        assert y.shape[0] == rows, f"{y.shape[0]} rows to combine, {rows} were dispatched"
        shared = _SharedState(route, self, dispatched.incoming)
        ticket = _CombineStart.apply(y, shared)
        return Pending(ticket, lambda ticket: _CombineWait.apply(ticket, shared))


class _SharedState:
    """State that a start and its wait share: the route, and the transfer of this direction in this pass."""

    def __init__(self, route: HoppingRoute, dispatcher: RoutedDispatcher, incoming: Incoming | None = None) -> None:
        self.route = route
        self.incoming = incoming or Incoming()
        self.needs_grad: tuple[bool, ...] = ()
        self.codes: BlockQuantized | None = None
        self._dispatcher = dispatcher
        self._transfer: HoppedTransfer[Any] | None = None

    def begin(self, way: Way, hops: Hops[Any], device: torch.device) -> None:
        dispatcher = self._dispatcher
        fused = takes_fused_kernels(device)
        # The exchanges of a group of one rank order no streams.
        between = partial(beside, device) if fused and dispatcher.size > 1 else nullcontext
        transfer = HoppedTransfer(hops, dispatcher.hops, dispatcher.phases_before_next_hop[way], between)
        self._transfer = transfer
        if not fused:
            dispatcher.options.in_flight.add(transfer)
            return
        while transfer.can_advance:  # a stream beside the one that computes waits between the hops, not the host
            transfer.advance()

    def wait(self) -> Any:
        assert self._transfer is not None, "waited twice for one transfer"
        transfer, self._transfer = self._transfer, None
        return transfer.wait()


def _ticket(like: Tensor) -> Tensor:
    """Scalar whose value nobody reads. On a CPU it is zero, which costs no launch."""
    return torch.empty((), device=like.device) if like.device.type != "cpu" else torch.zeros(())


class _DispatchStart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, shared: _SharedState) -> Tensor:
        shared.begin("to experts", shared.route.dispatch(x, weights), x.device)
        shared.needs_grad = ctx.needs_input_grad[:2]
        ctx.shared = shared
        return _ticket(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        returned: Returned = ctx.shared.wait()
        return returned.x, returned.weights, None


class _DispatchWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, shared: _SharedState) -> tuple[Tensor, Tensor]:
        arrived: Arrived = shared.wait()
        shared.codes = arrived.codes
        # Aliases: the route may hold the tensors themselves, and a tensor holds the node whose output it is. The node
        # holds the route, so nothing of the layer would ever be freed.
        outputs = arrived.rows.detach(), arrived.weights.detach()
        constant = [out for out, needs_grad in zip(outputs, shared.needs_grad, strict=True) if not needs_grad]
        ctx.mark_non_differentiable(*constant)
        ctx.shared = shared
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        rows_need_grad, weights_need_grad = shared.needs_grad
        hops = shared.route.dispatch_backward(
            grad_rows if rows_need_grad else None, grad_row_weights if weights_need_grad else None
        )
        shared.begin("to tokens", hops, grad_rows.device)
        return _ticket(grad_rows), None


def _finish_dispatch(ticket: Tensor, shared: _SharedState) -> Dispatched:
    route = shared.route
    rows, row_weights = _DispatchWait.apply(ticket, shared)
    codes, shared.codes = shared.codes, None
    return Dispatched(rows, row_weights, route.offsets, route.tokens_per_expert, route, codes)


class _CombineStart(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, shared: _SharedState) -> Tensor:
        shared.begin("to tokens", shared.route.combine(y), y.device)
        ctx.shared = shared
        return _ticket(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        arrived: Decoded = ctx.shared.wait()
        if ctx.shared.incoming.wanted:
            ctx.shared.incoming.codes = arrived.codes
        return arrived.values, None


class _CombineWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, shared: _SharedState) -> Tensor:
        out: Tensor = shared.wait()
        ctx.shared = shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.shared.begin("to experts", ctx.shared.route.combine_backward(grad), grad.device)
        return _ticket(grad), None
