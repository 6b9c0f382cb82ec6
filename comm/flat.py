"""Flat dispatch: one all-to-all that sends one row per (token, expert) pair."""

from __future__ import annotations

from torch import Tensor

from .exchange import Exchange
from .hops import Hops
from .routed import Arrived, Returned, RoutedDispatcher
from .steps.branch import takes_fused_kernels
from .steps.flat_fused import FusedSteps
from .steps.flat_plain import PlainSteps
from .streams import OnItsWay
from .wire import Decoded


class FlatDispatcher(RoutedDispatcher):
    """Token dispatch by one all-to-all in a group of any size that divides the experts; see `RoutedDispatcher`."""

    def begin_route(self, expert_ids: Tensor) -> FlatRoute:
        fused = takes_fused_kernels(expert_ids.device)
        local, alignment = self.num_experts // self.size, self.options.alignment
        return FlatRoute((FusedSteps if fused else PlainSteps)(expert_ids, self.size, local, alignment), self)


class FlatRoute:
    """Order of the rows of one dispatch on both sides; made in two halves around the exchange of counts.

    The constructor launches the counts of this rank's slots, which `steps` has sorted; `complete` waits for the counts.
    Until then the local rows can be gathered. Rows arrive sorted by (source rank, local expert, token). The experts get
    them sorted by (local expert, source rank, token), with zeros at the end of each expert where rows are aligned.
    """

    tokens_per_expert: list[int]
    offsets: Tensor

    def __init__(self, steps: FusedSteps | PlainSteps, dispatcher: FlatDispatcher) -> None:
        self._steps, self._dispatcher = steps, dispatcher
        splits = [dispatcher.num_experts // dispatcher.size] * dispatcher.size
        sent = dispatcher.send_counts(steps.counts, splits, splits, steps.into)
        self._counts: OnItsWay | None = OnItsWay(steps.counts.device, lambda: self._numbers(sent))

    def _numbers(self, sent: Exchange) -> Tensor:
        """Counts that the host has to know, once they have arrived."""
        self._received = sent.wait()
        return self._steps.numbers(self._received)

    def complete(self) -> None:
        if self._counts is None:
            return
        steps, size = self._steps, self._dispatcher.size
        on_host = self._dispatcher.read_counts(self._counts.wait())
        self._counts = None
        sent_on_host, received_on_host = on_host[:size], on_host[size : 2 * size]
        self._send_splits = [sum(row) for row in sent_on_host]
        self._receive_splits = [sum(row) for row in received_on_host]
        self._rows_sent = sum(self._send_splits)
        unknown = steps.slots - self._rows_sent - on_host[-1][0]
        assert unknown == 0, f"{unknown} expert ids are no expert's"
        steps.complete(self._received, self._rows_sent, received_on_host)
        self.tokens_per_expert, self.offsets = steps.tokens_per_expert, steps.offsets

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        dtype, width, steps, wire = x.dtype, x.shape[1], self._steps, self._dispatcher.options.wire
        # Rows are gathered while the counts are exchanged; slots that are sent nowhere come last.
        rows = steps.to_slots(wire.encode(x, "forward"))
        row_weights = steps.weights_to_slots(weights)
        del x, weights
        self.complete()
        sent = self._send(rows, "dispatch"), self._send(row_weights, "dispatch")
        del rows, row_weights
        yield
        arrived, arrived_weights = (exchange.wait() for exchange in sent)
        values, codes = wire.decode(steps.to_experts(arrived), dtype, width)
        return Arrived(values, steps.weights_to_experts(arrived_weights), codes)

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        steps, purpose = self._steps, "dispatch backward"
        sent_rows = None if rows is None else self._send_back(steps.to_sources(rows), purpose)
        sent_weights = None if weights is None else self._send_back(steps.weights_to_sources(weights), purpose)
        del rows, weights
        yield
        grad_rows = None if sent_rows is None else sent_rows.wait()
        grad_weights = None if sent_weights is None else steps.from_slots(sent_weights.wait())
        return Returned(None if grad_rows is None else self.sum(grad_rows), grad_weights)

    def combine(self, y: Tensor) -> Hops[Tensor]:
        sent = self._send_back(self._steps.to_sources(y), "combine")
        del y
        yield
        return self.sum(sent.wait())

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        dtype, width, wire = grad.dtype, grad.shape[1], self._dispatcher.options.wire
        rows = self._steps.to_slots(wire.encode(grad, "backward"))
        sent = self._send(rows, "combine backward")
        del grad, rows
        yield
        return wire.decode(self._steps.to_experts(sent.wait()), dtype, width)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum of each token's returned rows, by slot."""
        return self._steps.sum(rows)

    def _send(self, rows: Tensor, purpose: str) -> Exchange:
        """Send rows of all slots, in their order, from the tokens' rank to the experts'."""
        return self._exchange(rows[: self._rows_sent], self._send_splits, self._receive_splits, purpose)

    def _send_back(self, rows: Tensor, purpose: str) -> Exchange:
        """Send rows in the order of arrival from the experts' rank to the tokens'."""
        return self._exchange(rows, self._receive_splits, self._send_splits, purpose)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int], purpose: str) -> Exchange:
        return Exchange(rows, send, receive, self._dispatcher.group, self._dispatcher.meter, purpose)
