"""Flat dispatch: one all-to-all that sends every (token, expert) row by itself.

Each direction is two autograd Functions, a start that launches and a wait that waits, joined by a scalar ticket:

    forward    start: gather, launch -> ticket -> wait: wait, gather
    backward   start: wait, gather   <- ticket <- wait: gather, launch

so no tensor that is still being received is ever visible to autograd, its hooks or its anomaly mode.

The Functions keep their indices on the shared `_Route` and save no tensors: an index is a fraction of a percent of the
row it moves, dispatch and combine share them, and as combine saves nothing, a checkpointed layer that ends with it is
recomputed only up to the last tensor its experts saved: the rows are not sent back a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..settings import UsageError
from .dispatcher import Dispatched, Pending
from .exchange import Exchange
from .permute import gather_sum, order_by_expert, transpose_blocks


class FlatDispatcher:
    """Token dispatch by one all-to-all in a group of any size that divides the experts; see `Dispatcher`.

    Rank r of the group holds the experts r E_local to (r + 1) E_local - 1.

    Args:
        group: the expert parallel group. None is this process by itself; then, and in a group of one rank, nothing is
            communicated.
        num_experts: E, routed experts of the layer over the whole group.
        alignment: each expert's rows are filled up with zeros to a multiple of it. Matrix products in FP8 want that,
            and here it costs nothing: the rows are moved to their places anyhow.

    Raises:
        UsageError: the group does not divide the experts.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_experts: int, alignment: int = 1) -> None:
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

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        return self.begin_dispatch(x, expert_ids, weights).wait()

    def begin_route(self, expert_ids: Tensor) -> _Route:
        return _Route(expert_ids, self.num_experts, self.group, self.alignment)

    def begin_dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, route: _Route | None = None
    ) -> Pending[Dispatched]:
        assert x.shape[0] == expert_ids.shape[0], f"{x.shape[0]} tokens but expert ids for {expert_ids.shape[0]}"
        assert weights.shape == expert_ids.shape, f"weights {weights.shape} for expert ids {expert_ids.shape}"
        assert weights.dtype == torch.float32, f"gate weights are FP32, not {weights.dtype}"
        transfer = _Transfer(route or self.begin_route(expert_ids))
        ticket = _DispatchStart.apply(x, weights, transfer)
        return Pending(ticket, lambda ticket: _finish_dispatch(ticket, transfer))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.begin_combine(y, dispatched).wait()

    def begin_combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        route = dispatched.handle
        rows = sum(route.tokens_per_expert)
        assert y.shape[0] == rows, f"{y.shape[0]} rows to combine, {rows} were dispatched"
        transfer = _Transfer(route)
        ticket = _CombineStart.apply(y, transfer)
        return Pending(ticket, lambda ticket: _CombineWait.apply(ticket, transfer))


class _Route:
    """Where the rows of one dispatch go, on both sides; made in two halves around the exchange of counts.

    The constructor sorts this rank's slots and launches the counts; `complete` waits for them. Until then the local
    rows can be gathered. The rows arrive sorted by (source rank, local expert, token); `to_experts` reorders them to
    (local expert, source rank, token), with zeros at the end of each expert where rows are aligned, and `to_sources`
    back.
    """

    def __init__(
        self, expert_ids: Tensor, num_experts: int, group: dist.ProcessGroup | None, alignment: int = 1
    ) -> None:
        self.group = group
        self.alignment = alignment
        self.group_size = 1 if group is None else group.size()
        self.num_local_experts = num_experts // self.group_size
        self.order = order_by_expert(expert_ids, num_experts)
        # Indices between the two orders, None where these are the same. Where rows are aligned, by_source is where
        # each row lies among the experts' and takes its way back, and padding the rows that are zero.
        self.by_expert: Tensor | None = None
        self.by_source: Tensor | None = None
        self.padding: Tensor | None = None
        each = [self.num_local_experts] * self.group_size
        self._counts = Exchange(self.order.rows_per_expert, each, each, group)

    def complete(self) -> None:
        shape = self.group_size, self.num_local_experts
        sent, received = self.order.rows_per_expert.view(shape), self._counts.wait().view(shape)
        sent_on_host, received_on_host = torch.stack((sent, received)).tolist()  # the only wait for the device
        self.send_splits = [sum(row) for row in sent_on_host]
        self.receive_splits = [sum(row) for row in received_on_host]
        self.rows_received = sum(self.receive_splits)
        self.tokens_per_expert = [sum(column) for column in zip(*received_on_host, strict=True)]
        self.offsets = received.sum(0).cumsum(0).to(torch.int32)
        slots = self.order.slot_of_row.numel()
        assert sum(self.send_splits) == slots, f"{slots - sum(self.send_splits)} expert ids are no expert's"
        if min(shape) > 1:
            self.by_expert = transpose_blocks(received, self.rows_received)
            self.by_source = transpose_blocks(received.t(), self.rows_received)
        if self.alignment > 1:
            self._align(received.sum(0))

    def _align(self, counts: Tensor) -> None:
        """Make room after each expert's rows, of which there are `counts` int64 [E_local]."""
        unit = self.alignment
        self.tokens_per_expert = [-(-count // unit) * unit for count in self.tokens_per_expert]
        short = -counts % unit
        ends, wide_ends = counts.cumsum(0), (counts + short).cumsum(0)
        self.offsets = wide_ends.to(torch.int32)
        rows, wide = self.rows_received, sum(self.tokens_per_expert)
        place = torch.arange(rows, device=counts.device) if self.by_source is None else self.by_source
        self.by_source = place + (wide_ends - short - ends)[torch.searchsorted(ends, place, right=True)]
        first = wide_ends - short - (short.cumsum(0) - short)  # of the padding, less that of the experts before
        first = torch.repeat_interleave(first, short, output_size=wide - rows)
        self.padding = first + torch.arange(wide - rows, device=counts.device)

    def to_experts(self, rows: Tensor) -> Tensor:
        """From the order of arrival to that of the experts."""
        if self.padding is None:
            return _select(rows, self.by_expert)
        assert self.by_source is not None
        wide = rows.new_empty(sum(self.tokens_per_expert), *rows.shape[1:])
        return wide.index_copy_(0, self.by_source, rows).index_fill_(0, self.padding, 0)

    def to_sources(self, rows: Tensor) -> Tensor:
        """Back to the order of arrival; the rows that fill experts up are left behind."""
        return _select(rows, self.by_source)

    def send(self, rows: Tensor) -> Exchange:
        """From the tokens' rank, in `order`, to the experts' rank."""
        return Exchange(rows, self.send_splits, self.receive_splits, self.group)

    def send_back(self, rows: Tensor) -> Exchange:
        """From the experts' rank, sorted by expert, to the tokens' rank."""
        return Exchange(self.to_sources(rows), self.receive_splits, self.send_splits, self.group)


class _Transfer:
    """What a start and its wait share: the route, and the exchanges under way in this direction of this pass."""

    def __init__(self, route: _Route) -> None:
        self.route = route
        self.needs_grad: tuple[bool, ...] = ()
        self._under_way: list[Exchange | None] = []

    def launch(self, *exchanges: Exchange | None) -> None:
        self._under_way = list(exchanges)

    def wait(self) -> list[Tensor | None]:
        assert self._under_way, "waited twice for one transfer"
        exchanges, self._under_way = self._under_way, []
        return [None if exchange is None else exchange.wait() for exchange in exchanges]


def _select(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _ticket(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


class _DispatchStart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, transfer: _Transfer) -> Tensor:
        route = transfer.route
        rows = x.index_select(0, route.order.token_of_row)  # while the counts travel
        row_weights = weights.reshape(-1).index_select(0, route.order.slot_of_row)
        route.complete()
        transfer.launch(route.send(rows), route.send(row_weights))
        transfer.needs_grad = ctx.needs_input_grad[:2]
        ctx.transfer = transfer
        return _ticket(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        order = ctx.transfer.route.order
        grad_rows, grad_row_weights = ctx.transfer.wait()
        grad_x = None if grad_rows is None else gather_sum(grad_rows, order.row_of_slot)
        grad_weights = None
        if grad_row_weights is not None:
            grad_weights = grad_row_weights.index_select(0, order.row_of_slot.view(-1)).view_as(order.row_of_slot)
        return grad_x, grad_weights, None


class _DispatchWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: _Transfer) -> tuple[Tensor, Tensor]:
        rows, row_weights = transfer.wait()
        assert rows is not None and row_weights is not None
        outputs = transfer.route.to_experts(rows), transfer.route.to_experts(row_weights)
        constant = [out for out, needs_grad in zip(outputs, transfer.needs_grad, strict=True) if not needs_grad]
        ctx.mark_non_differentiable(*constant)
        ctx.transfer = transfer
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor) -> tuple[Tensor, None]:
        route, (rows_need_it, weights_need_it) = ctx.transfer.route, ctx.transfer.needs_grad
        ctx.transfer.launch(
            route.send_back(grad_rows) if rows_need_it else None,
            route.send_back(grad_row_weights) if weights_need_it else None,
        )
        return _ticket(grad_rows), None


def _finish_dispatch(ticket: Tensor, transfer: _Transfer) -> Dispatched:
    route = transfer.route
    rows, row_weights = _DispatchWait.apply(ticket, transfer)
    return Dispatched(rows, row_weights, route.offsets, route.tokens_per_expert, route)


class _CombineStart(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, transfer: _Transfer) -> Tensor:
        transfer.launch(transfer.route.send_back(y))
        ctx.transfer = transfer
        return _ticket(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (grad_rows,) = ctx.transfer.wait()
        return ctx.transfer.route.to_experts(grad_rows), None


class _CombineWait(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: _Transfer) -> Tensor:
        (rows,) = transfer.wait()
        assert rows is not None
        ctx.transfer = transfer
        return gather_sum(rows, transfer.route.order.row_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.transfer.route
        ctx.transfer.launch(route.send(grad.index_select(0, route.order.token_of_row)))
        return _ticket(grad), None
