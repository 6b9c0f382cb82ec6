"""Work of a two-hop route by torch's operations, on CPUs; `two_hop_fused.py` does the same by fused kernels.

G ranks of the group, N nodes, T tokens of this rank, P tokens that it relays, A tokens that arrive, R rows, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..expand import Expansion
from ..message import MessageLayout
from ..nodes import NodeMap
from ..permute import FanOut

Blocks = dict[int, range]
"""Places of the tokens of each source in the order of arrival."""
Parts = tuple[Tensor, ...]
"""Parts of messages before they are sent."""


class PlainSteps:
    """Indices of one route, and the moves and sums of rows along it.

    Args:
        expert_ids: int64 [T, K].
        places: position of this rank among the nodes of its group.
        alignment: multiple to which each expert's rows are filled up.
    """

    def __init__(self, expert_ids: Tensor, places: NodeMap, alignment: int) -> None:
        self._expert_ids, self._places, self._alignment = expert_ids, places, alignment
        nodes, size, per_rank = places.nodes, len(places.nodes.of), places.per_rank
        device = expert_ids.device
        dropped = expert_ids < 0
        ranks = torch.div(expert_ids.clamp(min=0), per_rank, rounding_mode="floor")
        to_node = places.node_of(device)[ranks]
        to_rank = _wanted(ranks.masked_fill(dropped, size), size)
        self._to_node = _wanted(to_node.masked_fill(dropped, nodes.count), nodes.count)
        per_expert = torch.zeros(size * per_rank + 1, dtype=torch.int64, device=device)
        slots = expert_ids.masked_fill(dropped, size * per_rank).reshape(-1)
        per_expert = per_expert.scatter_add_(0, slots, torch.ones_like(slots))[:-1].view(size, per_rank)
        per_rank_tokens, self._per_node = to_rank.sum(0), self._to_node.sum(0)
        parts = [
            part
            for node in range(nodes.count)
            for members in [nodes.members(node)]
            for rank in members
            for part in (
                per_expert[rank], per_rank_tokens[members.start : members.stop], self._per_node[node : node + 1]
            )
        ]  # fmt: skip
        self.counts = torch.cat(parts)
        """int64, for each rank: rows of its experts, tokens for the ranks of its node, tokens for its node."""
        self.into: Tensor | None = None
        """Memory for the counts that this rank receives; None leaves it to the exchange."""
        self.tokens_per_expert: list[int] = []

    def prepare(self) -> None:
        """Compute what needs no counts, while they are exchanged."""

    def numbers(self, received: Tensor) -> Tensor:
        """Counts from all ranks, followed by the tokens of this rank for each node: what the host has to know."""
        return torch.cat((received, self._per_node))

    def complete(self, received: Tensor, rows_per_expert: list[int], copies: tuple[int, int], blocks: Blocks) -> None:
        """Take the counts: `received` [G, ...], rows of this rank's experts, copies that each hop sends, and the blocks
        of tokens of each source in the order of arrival."""
        self._received = received[:, : self._places.per_rank].sum(0)
        self._rows_per_expert, self._copies = rows_per_expert, copies
        self._source = FanOut(self._to_node, copies[0])
        self._by_source = _block_order([blocks[source] for source in sorted(blocks)], received.device)

    def join(self, payload: Tensor, weights: Tensor, layout: MessageLayout) -> Parts:
        """Join the parts of this rank's messages, as far as that can be done before the counts have arrived."""
        return (layout.join(payload, weights, self._expert_ids),)

    def messages(self, parts: Parts, layout: MessageLayout) -> Tensor:
        """Messages of this rank's tokens for each node, from the result of `join`."""
        return parts[0].index_select(0, self._source.row_of_copy)

    def relay(self, relayed: Tensor, layout: MessageLayout) -> Tensor:
        """Copies of the messages that this rank relays, for the ranks of its node."""
        members = self._places.members
        rank = torch.div(layout.ids(relayed).long(), self._places.per_rank, rounding_mode="floor") - members.start
        elsewhere = (rank < 0) | (rank >= len(members))
        wanted = _wanted(rank.masked_fill(elsewhere, len(members)), len(members))
        self._relay = FanOut(wanted, self._copies[1])
        return relayed.index_select(0, self._relay.row_of_copy)

    def expand(self, arrived: Tensor, layout: MessageLayout) -> tuple[Tensor, Tensor]:
        """Rows [R, ...] of this rank's experts, in the form in which they were sent, and their weights FP32 [R]."""
        payload, weights, ids = layout.payload(arrived), layout.weights(arrived), layout.ids(arrived).long()
        if self._by_source is not None:
            ids = ids.index_select(0, self._by_source)
        local = ids - self._places.rank * self._places.per_rank
        local = local.masked_fill((local < 0) | (local >= self._places.per_rank), -1)
        self._expansion = Expansion(local, self._received, self._rows_per_expert, self._alignment, self._by_source)
        aligned = self._expansion.aligned
        self.tokens_per_expert, self.offsets = aligned.tokens_per_expert, aligned.offsets
        rows = self._expansion.rows(payload)
        if self._by_source is not None:
            weights = weights.index_select(0, self._by_source)
        return rows, self._expansion.weights(weights)

    def from_source(self, rows: Tensor) -> Tensor:
        """Copies of this rank's rows for each node."""
        return rows.index_select(0, self._source.row_of_copy)

    def from_relay(self, rows: Tensor) -> Tensor:
        """Copies of the rows that this rank relays, for the ranks of its node."""
        return rows.index_select(0, self._relay.row_of_copy)

    def to_experts(self, rows: Tensor) -> Tensor:
        """Rows [R, ...] of this rank's experts, from the rows that arrived."""
        return self._expansion.rows(rows)

    def sum_here(self, rows: Tensor) -> Tensor:
        """Sums of the rows [R, H] of each token that arrived: [A, H], in the order of arrival."""
        return self._by_arrival(self._expansion.sum(rows))

    def slots(self, weights: Tensor) -> Tensor:
        """Numbers [A, K] for the slots of the tokens that arrived, from one per row; 0 for experts of other ranks."""
        return self._by_arrival(self._expansion.slots(weights))

    def sum_at_relay(self, rows: Tensor) -> Tensor:
        """Sums of the copies of each relayed token."""
        return self._relay.back.sum(rows)

    def sum_at_source(self, rows: Tensor) -> Tensor:
        """Sums of the copies of each token of this rank."""
        return self._source.back.sum(rows)

    def _by_arrival(self, rows: Tensor) -> Tensor:
        """Rows in the order of arrival, from the order of sources."""
        if self._by_source is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self._by_source, rows)


def _wanted(destinations: Tensor, count: int) -> Tensor:
    """Whether a row has each destination: bool [T, count] from int64 [T, K] in [0, count], where `count` means none."""
    wanted = torch.zeros(destinations.shape[0], count + 1, dtype=torch.bool, device=destinations.device)
    return wanted.scatter_(1, destinations, True)[:, :count]


def _block_order(blocks: Sequence[range], device: torch.device) -> Tensor | None:
    """Index that takes these blocks of rows in this order; None if they already are in this order."""
    if all(block.stop == following.start for block, following in pairwise(blocks)):
        return None
    order = torch.cat([torch.arange(block.start, block.stop) for block in blocks])
    if device.type == "cuda":
        order = order.pin_memory()  # a copy from other memory makes the host wait
    return order.to(device, non_blocking=True)
