"""Two-hop dispatch: a token crosses the network once per node that it needs, and is copied inside the node.

Tokens are sent as in V3 (§3.2.2). The first hop goes over the slow links between nodes, to the rank with the sender's
local index on each node, the relay. The second hop goes inside the node, once to each rank with some of the token's
experts. Combine takes the same way back: ranks add up the outputs of their experts, the relay adds up the sums of its
node, and one sum per node crosses the network. Node-limited routing bounds the number of a token's nodes, whatever the
number of its experts.

    dispatch    token -> [node] relay -> [rank] -> rows of its experts
    combine     rows -> sum per rank -> [relay] sum per node -> [token's rank] sum

A token, its gate weights and its experts' numbers are sent as one message. G ranks of the group, N nodes, n ranks of
this node, T tokens of this rank, P tokens that it relays, A tokens that arrive, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange
from .hops import Hops
from .message import MessageLayout
from .nodes import NodeMap, Nodes
from .routed import Arrived, DispatchOptions, Returned, RoutedDispatcher, Way
from .steps.branch import takes_fused_kernels
from .steps.two_hop_fused import FusedSteps
from .steps.two_hop_plain import Blocks, PlainSteps
from .streams import OnItsWay
from .wire import Decoded


class TwoHopDispatcher(RoutedDispatcher):
    """Token dispatch over nodes; see `RoutedDispatcher`.

    Sums differ from the flat dispatcher's only in their order: first over a token's experts on a rank, then over the
    ranks of a node, then over nodes. Each partial sum is rounded to the type of the rows, because it is sent.

    Args:
        nodes: the node of each rank of the group, ascending; by default all are on one.
    """

    hops = 2
    # To the experts the first hop is the long one, and the second hop needs all its rows. On the way back the second
    # hop is the long one.
    phases_before_next_hop: Mapping[Way, int] = {"to experts": 2, "to tokens": 1}

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_experts: int,
        options: DispatchOptions | None = None,
        nodes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(group, num_experts, options)
        size = 1 if group is None else group.size()
        self.nodes = Nodes.make([0] * size if nodes is None else nodes)
        assert len(self.nodes.of) == size, f"{len(self.nodes.of)} nodes for {size} ranks"
        self.places = NodeMap(self.nodes, 0 if group is None else group.rank(), num_experts // size)

    def begin_route(self, expert_ids: Tensor) -> TwoHopRoute:
        return TwoHopRoute(expert_ids, self)


class TwoHopRoute:
    """Route of the tokens of one dispatch: as seen by their own rank, by relays and by the experts' ranks."""

    tokens_per_expert: list[int]
    offsets: Tensor

    def __init__(self, expert_ids: Tensor, dispatcher: TwoHopDispatcher) -> None:
        self._dispatcher, places = dispatcher, dispatcher.places
        kind = FusedSteps if takes_fused_kernels(expert_ids.device) else PlainSteps
        self._steps = kind(expert_ids, places, dispatcher.options.alignment)
        receive = [places.counts_received] * len(places.nodes.of)
        sent = dispatcher.send_counts(self._steps.counts, places.counts_sent, receive, self._steps.into)
        self._counts: OnItsWay | None = OnItsWay(expert_ids.device, lambda: self._numbers(sent))
        self._steps.prepare()

    def _numbers(self, sent: Exchange) -> Tensor:
        """Counts that the host has to know, once they have arrived."""
        received = sent.wait()
        self._received = received.view(len(self._dispatcher.nodes.of), -1)
        return self._steps.numbers(received)

    def complete(self) -> None:
        if self._counts is None:
            return
        dispatcher, places = self._dispatcher, self._dispatcher.places
        together = dispatcher.read_counts(self._counts.wait())
        self._counts = None
        width, size, first = places.counts_received, len(places.nodes.of), places.per_rank
        counts = [together[start : start + width] for start in range(0, width * size, width)]
        rows_per_expert = [sum(column) for column in zip(*(row[:first] for row in counts), strict=True)]
        # tokens[source][i]: tokens of a source for the i-th rank of this node; for_node[source]: for any of its ranks.
        tokens, for_node = [row[first:-1] for row in counts], [row[-1] for row in counts]
        own, clients = places.rank - places.members.start, places.clients
        self._hop_1 = _splits(size, dict(zip(places.relays, together[width * size :], strict=True)))
        self._from_1 = _splits(size, {source: for_node[source] for source in clients[places.rank]})
        relayed = {
            rank: sum(tokens[source][i] for source in clients[places.rank]) for i, rank in enumerate(places.members)
        }
        self._hop_2 = _splits(size, relayed)
        self._from_2 = _splits(size, {rank: sum(tokens[s][own] for s in clients[rank]) for rank in places.members})
        # Tokens arrive by relay and then by source; the experts' rows are sorted by source.
        blocks: Blocks = {}
        start = 0
        for source in places.arrival:
            blocks[source] = range(start, start + tokens[source][own])
            start = blocks[source].stop
        self._steps.complete(self._received, rows_per_expert, (sum(self._hop_1), sum(self._hop_2)), blocks)

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        wire, dtype, width = self._dispatcher.options.wire, x.dtype, x.shape[1]
        payload = wire.encode(x, "forward")
        layout = MessageLayout.of(payload, weights.shape[1], self._dispatcher.num_experts)
        parts = self._steps.join(payload, weights, layout)
        del x, weights, payload
        self.complete()
        sent = self._exchange(self._steps.messages(parts, layout), 1, "dispatch")
        del parts
        yield
        relayed = sent.wait()
        sent = self._exchange(self._steps.relay(relayed, layout), 2, "dispatch")
        del relayed
        yield
        rows, row_weights = self._steps.expand(sent.wait(), layout)
        self.tokens_per_expert, self.offsets = self._steps.tokens_per_expert, self._steps.offsets
        values, codes = wire.decode(rows, dtype, width)
        return Arrived(values, row_weights, codes)

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        steps, purpose = self._steps, "dispatch backward"
        partial = None if rows is None else steps.sum_here(rows)
        slots = None if weights is None else steps.slots(weights)
        del rows, weights
        for hop, add_up in ((2, steps.sum_at_relay), (1, steps.sum_at_source)):
            sent = [
                None if part is None else self._exchange(part, hop, purpose, reverse=True) for part in (partial, slots)
            ]
            yield
            partial, slots = (None if exchange is None else add_up(exchange.wait()) for exchange in sent)
        return Returned(partial, slots)

    def combine(self, y: Tensor) -> Hops[Tensor]:
        partial = self._steps.sum_here(y)
        del y
        for hop, add_up in ((2, self._steps.sum_at_relay), (1, self._steps.sum_at_source)):
            sent = self._exchange(partial, hop, "combine", reverse=True)
            yield
            partial = add_up(sent.wait())
        return partial

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        dtype, width = grad.dtype, grad.shape[1]
        rows = self._dispatcher.options.wire.encode(grad, "backward")
        del grad
        for hop, copies in ((1, self._steps.from_source), (2, self._steps.from_relay)):
            sent = self._exchange(copies(rows), hop, "combine backward")
            yield
            rows = sent.wait()
        return self._dispatcher.options.wire.decode(self._steps.to_experts(rows), dtype, width)

    def _exchange(self, rows: Tensor, hop: int, purpose: str, reverse: bool = False) -> Exchange:
        send, receive = (self._hop_1, self._from_1) if hop == 1 else (self._hop_2, self._from_2)
        if reverse:
            send, receive = receive, send
        return Exchange(rows, send, receive, self._dispatcher.group, self._dispatcher.meter, purpose)


def _splits(size: int, rows: dict[int, int]) -> list[int]:
    return [rows.get(rank, 0) for rank in range(size)]
