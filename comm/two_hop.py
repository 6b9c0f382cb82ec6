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
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange
from .expand import Expansion
from .hops import Hops
from .permute import FanOut
from .routed import Arrived, DispatchOptions, Returned, RoutedDispatcher, Way
from .wire import Decoded

ALIGNMENT = 16  # bytes; the size of a message is a multiple


@dataclass(frozen=True)
class Nodes:
    """Ranks of a group by node, any number on each, and the ranks that relay tokens between nodes.

    Args:
        of: the node of each rank of the group, ascending.
    """

    of: tuple[int, ...]

    @classmethod
    def make(cls, nodes: Sequence[int]) -> Nodes:
        """Make `Nodes` from any ascending numbers of the ranks' nodes."""
        assert list(nodes) == sorted(nodes), f"ranks of a node are neighbours, unlike {nodes}"
        number = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
        return cls(tuple(number[node] for node in nodes))

    @property
    def count(self) -> int:
        return self.of[-1] + 1

    def members(self, node: int) -> range:
        """Ranks of a node."""
        return range(self.of.index(node), len(self.of) - self.of[::-1].index(node))

    def relay(self, source: int, node: int) -> int:
        """Rank of `node` that receives the tokens of `source` for this node: the rank with the local index of
        `source`, modulo the number of ranks on the node. On its own node every rank is its own relay."""
        members = self.members(node)
        return members[(source - self.members(self.of[source]).start) % len(members)]

    def clients(self, relay: int) -> list[int]:
        """Ranks that a rank relays for, itself included."""
        return [source for source in range(len(self.of)) if self.relay(source, self.of[relay]) == relay]


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
        self.rank = 0 if group is None else group.rank()
        self.nodes = Nodes.make([0] * size if nodes is None else nodes)
        assert len(self.nodes.of) == size, f"{len(self.nodes.of)} nodes for {size} ranks"
        self.members = self.nodes.members(self.nodes.of[self.rank])
        self.relays = [self.nodes.relay(self.rank, node) for node in range(self.nodes.count)]
        """Relays of this rank, by node."""
        self.clients = {rank: self.nodes.clients(rank) for rank in self.members}
        """Ranks that each rank of this node relays for."""
        self._node_of = torch.tensor(self.nodes.of)

    def node_of(self, device: torch.device) -> Tensor:
        """Node of each rank, int64 [G]; copied to a device once only, as the host waits for the copy."""
        if self._node_of.device != device:
            self._node_of = self._node_of.to(device)
        return self._node_of

    def begin_route(self, expert_ids: Tensor) -> TwoHopRoute:
        return TwoHopRoute(expert_ids, self)


class TwoHopRoute:
    """Route of the tokens of one dispatch: as seen by their own rank, by relays and by the experts' ranks."""

    tokens_per_expert: list[int]
    offsets: Tensor

    def __init__(self, expert_ids: Tensor, dispatcher: TwoHopDispatcher) -> None:
        self._dispatcher = dispatcher
        self._expert_ids = expert_ids
        size, self._per_rank = len(dispatcher.nodes.of), dispatcher.num_experts // len(dispatcher.nodes.of)
        device = expert_ids.device
        dropped = expert_ids < 0
        ranks = torch.div(expert_ids.clamp(min=0), self._per_rank, rounding_mode="floor")
        nodes = dispatcher.node_of(device)[ranks]
        to_rank = _wanted(ranks.masked_fill(dropped, size), size)
        self._to_node = _wanted(nodes.masked_fill(dropped, dispatcher.nodes.count), dispatcher.nodes.count)
        per_expert = torch.zeros(dispatcher.num_experts + 1, dtype=torch.int64, device=device)
        slots = expert_ids.masked_fill(dropped, dispatcher.num_experts).reshape(-1)
        per_expert = per_expert.scatter_add_(0, slots, torch.ones_like(slots))[:-1].view(size, self._per_rank)
        per_rank, self._per_node = to_rank.sum(0), self._to_node.sum(0)
        # For each rank: rows for its experts, tokens for the ranks of its node, tokens for its node.
        parts = [
            part
            for node in range(dispatcher.nodes.count)
            for members in [dispatcher.nodes.members(node)]
            for rank in members
            for part in (per_expert[rank], per_rank[members.start : members.stop], self._per_node[node : node + 1])
        ]
        send = [self._per_rank + len(dispatcher.nodes.members(node)) + 1 for node in dispatcher.nodes.of]
        receive = self._per_rank + len(dispatcher.members) + 1
        self._counts: Exchange | None = Exchange(
            torch.cat(parts), send, [receive] * size, dispatcher.group, dispatcher.meter, "counts"
        )
        self._expansion: Expansion | None = None

    def complete(self) -> None:
        if self._counts is None:
            return
        dispatcher, members = self._dispatcher, self._dispatcher.members
        received = self._counts.wait().view(len(dispatcher.nodes.of), -1)
        self._counts = None
        together = dispatcher.read_counts(torch.cat((received.reshape(-1), self._per_node)))
        width = received.shape[1]
        counts = [together[start : start + width] for start in range(0, received.numel(), width)]
        first = self._per_rank
        self._received = received[:, :first].sum(0)
        self._rows_per_expert = [sum(column) for column in zip(*(row[:first] for row in counts), strict=True)]
        # tokens[source][i]: tokens of a source for the i-th rank of this node; for_node[source]: for any of its ranks.
        tokens, for_node = [row[first:-1] for row in counts], [row[-1] for row in counts]
        size, own = len(dispatcher.nodes.of), dispatcher.rank - members.start
        clients = dispatcher.clients[dispatcher.rank]
        self._hop_1 = _splits(size, dict(zip(dispatcher.relays, together[received.numel() :], strict=True)))
        self._from_1 = _splits(size, {source: for_node[source] for source in clients})
        self._hop_2 = _splits(
            size, {rank: sum(tokens[source][i] for source in clients) for i, rank in enumerate(members)}
        )
        self._from_2 = _splits(size, {rank: sum(tokens[s][own] for s in dispatcher.clients[rank]) for rank in members})
        # Tokens arrive by relay and then by source; the experts' rows are sorted by source.
        blocks, start = {}, 0
        for rank in members:
            for source in dispatcher.clients[rank]:
                blocks[source] = range(start, start + tokens[source][own])
                start = blocks[source].stop
        self._by_source = _block_order([blocks[source] for source in sorted(blocks)], received.device)
        self._source = FanOut(self._to_node, sum(self._hop_1))

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        wire, dtype, width = self._dispatcher.options.wire, x.dtype, x.shape[1]
        ids = self._expert_ids.to(torch.int16 if self._dispatcher.num_experts <= 2**15 else torch.int32)
        messages, ends = _join(wire.encode(x, "forward"), weights, ids)
        del x, weights
        self.complete()
        sent = self._exchange(messages.index_select(0, self._source.row_of_copy), 1, "dispatch")
        del messages
        yield
        relayed = sent.wait()
        self._relay = self._fan_out(_part(relayed, ends, 2, ids.dtype).long())
        sent = self._exchange(relayed.index_select(0, self._relay.row_of_copy), 2, "dispatch")
        del relayed
        yield
        arrived = sent.wait()
        payload, arrived_weights = arrived[:, : ends[0]], _part(arrived, ends, 1, torch.float32)
        expansion = self._expand(_part(arrived, ends, 2, ids.dtype).long())
        values, codes = wire.decode(expansion.rows(payload), dtype, width)
        if self._by_source is not None:
            arrived_weights = arrived_weights.index_select(0, self._by_source)
        return Arrived(values, expansion.weights(arrived_weights), codes)

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        assert self._expansion is not None
        expansion, purpose = self._expansion, "dispatch backward"
        partial = None if rows is None else self._by_arrival(expansion.sum(rows))
        slots = None if weights is None else self._by_arrival(expansion.slots(weights))
        del rows, weights
        for hop, sums in ((2, self._relay.back), (1, self._source.back)):
            sent = [
                None if part is None else self._exchange(part, hop, purpose, reverse=True) for part in (partial, slots)
            ]
            yield
            partial, slots = (None if exchange is None else sums.sum(exchange.wait()) for exchange in sent)
        return Returned(partial, slots)

    def combine(self, y: Tensor) -> Hops[Tensor]:
        assert self._expansion is not None
        partial = self._by_arrival(self._expansion.sum(y))
        del y
        for hop, sums in ((2, self._relay.back), (1, self._source.back)):
            sent = self._exchange(partial, hop, "combine", reverse=True)
            yield
            partial = sums.sum(sent.wait())
        return partial

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        assert self._expansion is not None
        dtype, width = grad.dtype, grad.shape[1]
        rows = self._dispatcher.options.wire.encode(grad, "backward")
        del grad
        for hop, fan_out in ((1, self._source), (2, self._relay)):
            sent = self._exchange(rows.index_select(0, fan_out.row_of_copy), hop, "combine backward")
            yield
            rows = sent.wait()
        return self._dispatcher.options.wire.decode(self._expansion.rows(rows), dtype, width)

    def _fan_out(self, ids: Tensor) -> FanOut:
        """Copies of the tokens [P, K] that this rank relays, for the ranks of its node."""
        members = self._dispatcher.members
        rank = torch.div(ids, self._per_rank, rounding_mode="floor") - members.start
        elsewhere = (rank < 0) | (rank >= len(members))
        return FanOut(_wanted(rank.masked_fill(elsewhere, len(members)), len(members)), sum(self._hop_2))

    def _expand(self, ids: Tensor) -> Expansion:
        """Expansion of the tokens [A, K] that arrived into rows of this rank's experts."""
        if self._by_source is not None:
            ids = ids.index_select(0, self._by_source)
        local = ids - self._dispatcher.rank * self._per_rank
        local = local.masked_fill((local < 0) | (local >= self._per_rank), -1)
        alignment = self._dispatcher.options.alignment
        expansion = Expansion(local, self._received, self._rows_per_expert, alignment, self._by_source)
        self._expansion = expansion
        self.tokens_per_expert, self.offsets = expansion.aligned.tokens_per_expert, expansion.aligned.offsets
        return expansion

    def _by_arrival(self, rows: Tensor) -> Tensor:
        """Rows in the order of arrival, from the order of sources."""
        if self._by_source is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self._by_source, rows)

    def _exchange(self, rows: Tensor, hop: int, purpose: str, reverse: bool = False) -> Exchange:
        send, receive = (self._hop_1, self._from_1) if hop == 1 else (self._hop_2, self._from_2)
        if reverse:
            send, receive = receive, send
        return Exchange(rows, send, receive, self._dispatcher.group, self._dispatcher.meter, purpose)


def _wanted(destinations: Tensor, count: int) -> Tensor:
    """Whether a row has each destination: bool [T, count] from int64 [T, K] in [0, count], where `count` means none."""
    wanted = torch.zeros(destinations.shape[0], count + 1, dtype=torch.bool, device=destinations.device)
    return wanted.scatter_(1, destinations, True)[:, :count]


def _splits(size: int, rows: dict[int, int]) -> list[int]:
    return [rows.get(rank, 0) for rank in range(size)]


def _block_order(blocks: list[range], device: torch.device) -> Tensor | None:
    """Index that takes these blocks of rows in this order; None if they already are in this order."""
    if all(block.stop == following.start for block, following in pairwise(blocks)):
        return None
    return torch.cat([torch.arange(block.start, block.stop) for block in blocks]).to(device, non_blocking=True)


def _join(*parts: Tensor) -> tuple[Tensor, list[int]]:
    """Messages uint8 [T, bytes] made of matrices of T rows each, and the end of each matrix in a message."""
    flat = [part.contiguous().view(torch.uint8) for part in parts]
    ends, end = [], 0
    for part in flat:
        end += part.shape[1]
        ends.append(end)
    short = -end % ALIGNMENT
    return torch.cat((*flat, flat[0].new_zeros(flat[0].shape[0], short)), 1), ends


def _part(messages: Tensor, ends: list[int], number: int, dtype: torch.dtype) -> Tensor:
    """Copy of one matrix in the messages of `_join`. A view would fail: a single row may start at any address."""
    return messages[:, ends[number - 1] : ends[number]].clone(memory_format=torch.contiguous_format).view(dtype)
