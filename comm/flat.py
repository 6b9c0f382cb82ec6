"""Flat dispatch: one all-to-all that sends one row per (token, expert) pair."""

from __future__ import annotations

import torch
from torch import Tensor

from .align import Aligned
from .exchange import Exchange
from .hops import Hops
from .permute import Choice, order_by_expert, transpose_blocks
from .routed import Arrived, Returned, RoutedDispatcher
from .wire import Decoded


class FlatDispatcher(RoutedDispatcher):
    """Token dispatch by one all-to-all in a group of any size that divides the experts; see `RoutedDispatcher`."""

    def begin_route(self, expert_ids: Tensor) -> FlatRoute:
        return FlatRoute(expert_ids, self)


class FlatRoute:
    """Order of the rows of one dispatch on both sides; made in two halves around the exchange of counts.

    The constructor sorts this rank's slots and launches the counts; `complete` waits for the counts. Until then the
    local rows can be gathered. Rows arrive sorted by (source rank, local expert, token). The experts get them sorted
    by (local expert, source rank, token), with zeros at the end of each expert where rows are aligned.
    """

    tokens_per_expert: list[int]
    offsets: Tensor

    def __init__(self, expert_ids: Tensor, dispatcher: FlatDispatcher) -> None:
        self._group, self._meter, self._wire = dispatcher.group, dispatcher.meter, dispatcher.options.wire
        self._alignment, self._read_counts = dispatcher.options.alignment, dispatcher.read_counts
        self._size = 1 if self._group is None else self._group.size()
        self._num_local_experts = dispatcher.num_experts // self._size
        self.order = order_by_expert(expert_ids, dispatcher.num_experts)
        splits = [self._num_local_experts] * self._size
        self._counts: Exchange | None = self._exchange(self.order.rows_per_expert, splits, splits, "counts")

    def complete(self) -> None:
        if self._counts is None:
            return
        shape = self._size, self._num_local_experts
        sent, received = self.order.rows_per_expert.view(shape), self._counts.wait().view(shape)
        self._counts = None
        dropped = self.order.dropped.expand(1, shape[1])
        on_host = self._read_counts(torch.cat((sent, received, dropped)))
        sent_on_host, received_on_host = on_host[: shape[0]], on_host[shape[0] : -1]
        self._send_splits = [sum(row) for row in sent_on_host]
        self._receive_splits = [sum(row) for row in received_on_host]
        self._rows_sent, rows_received = sum(self._send_splits), sum(self._receive_splits)
        unknown = self.order.slot_of_row.numel() - self._rows_sent - on_host[-1][0]
        assert unknown == 0, f"{unknown} expert ids are no expert's"
        self._sums = Choice.below(self.order.row_of_slot, self._rows_sent)
        per_expert = [sum(column) for column in zip(*received_on_host, strict=True)]
        self._aligned = Aligned(received.sum(0), per_expert, self._alignment)
        self.tokens_per_expert, self.offsets = self._aligned.tokens_per_expert, self._aligned.offsets
        # Indices between the order of arrival and the experts' order, None where the two are the same.
        several = min(shape) > 1
        self._by_expert = transpose_blocks(received, rows_received) if several else None
        self._by_source = self._aligned.positions(transpose_blocks(received.t(), rows_received) if several else None)

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        dtype, width = x.dtype, x.shape[1]
        # Rows are gathered while the counts are exchanged; slots that are sent nowhere come last.
        rows = self._wire.encode(x, "forward").index_select(0, self.order.token_of_row)
        row_weights = weights.reshape(-1).index_select(0, self.order.slot_of_row)
        del x, weights
        self.complete()
        sent = self._send(rows, "dispatch"), self._send(row_weights, "dispatch")
        del rows, row_weights
        yield
        arrived, arrived_weights = (exchange.wait() for exchange in sent)
        values, codes = self._wire.decode(self._to_experts(arrived), dtype, width)
        return Arrived(values, self._to_experts(arrived_weights), codes)

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        sent = [None if part is None else self._send_back(part, "dispatch backward") for part in (rows, weights)]
        del rows, weights
        yield
        grad_rows, grad_weights = (None if exchange is None else exchange.wait() for exchange in sent)
        if grad_weights is not None:
            slots, order = self.order.row_of_slot, self.order.slot_of_row[: self._rows_sent]
            grad_weights = grad_weights.new_zeros(slots.numel()).index_copy_(0, order, grad_weights).view(slots.shape)
        return Returned(None if grad_rows is None else self.sum(grad_rows), grad_weights)

    def combine(self, y: Tensor) -> Hops[Tensor]:
        sent = self._send_back(y, "combine")
        del y
        yield
        return self.sum(sent.wait())

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        dtype, width = grad.dtype, grad.shape[1]
        rows = self._wire.encode(grad, "backward").index_select(0, self.order.token_of_row)
        sent = self._send(rows, "combine backward")
        del grad, rows
        yield
        return self._wire.decode(self._to_experts(sent.wait()), dtype, width)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum of each token's returned rows, by slot."""
        return self._sums.sum(rows)

    def _to_experts(self, rows: Tensor) -> Tensor:
        """Rows in the experts' order, from the order of arrival."""
        return self._aligned.gather(rows, self._by_expert)

    def _send(self, rows: Tensor, purpose: str) -> Exchange:
        """Send rows of all slots, in their order, from the tokens' rank to the experts'."""
        return self._exchange(rows[: self._rows_sent], self._send_splits, self._receive_splits, purpose)

    def _send_back(self, rows: Tensor, purpose: str) -> Exchange:
        """Send rows sorted by expert from the experts' rank to the tokens', without the rows of zeros."""
        if self._by_source is not None:
            rows = rows.index_select(0, self._by_source)
        return self._exchange(rows, self._receive_splits, self._send_splits, purpose)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int], purpose: str) -> Exchange:
        return Exchange(rows, send, receive, self._group, self._meter, purpose)
