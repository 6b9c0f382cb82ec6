"""Count of what DeepEP sends, computed from the routing, because its kernels count no bytes.

A token crosses once to each node that it needs, to the GPU with the sender's local index, and inside the node once to
each other rank with some of its experts; combine takes the same way back. `comm/two_hop.py` sends in the same way, and
the counts are equal, with two differences:

- A rank counts every transfer of its tokens, including the second hop inside other nodes; two-hop counts at the rank
  that sends. The sums over a group are equal.
- With a token, DeepEP sends its experts and weights in 4 bytes each. Two-hop sends them in 2 and 4 bytes, and fills up
  the message to a multiple of 16.

The counts of tokens and the numbers of their positions (some bytes per token) are not counted. DeepEP sends in pieces
of a few tokens, while a message here is all that goes to one rank. A node stands for a GPU's domain of fast links.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routes.index import count_tokens
from ..meter import GroupMeter, LinkKind
from ..streams import OnItsWay

BYTES_PER_CHOICE = 4 + 4
"""Bytes sent to the experts per choice of a token, in addition to the token: the expert's number and its weight."""


class Crossings:
    """Numbers of tokens of this rank that one dispatch sends to each node and rank.

    Args:
        expert_ids: int64 [T, K], -1 is sent nowhere.
        ranges: table of `ranges_of`, on the device of the ids.
        rank: this rank of its group.
        nodes: number of nodes of the group, equally many ranks on each.
    """

    def __init__(self, expert_ids: Tensor, ranges: Tensor, rank: int, nodes: int) -> None:
        each = torch.arange(len(ranges) + 1, dtype=torch.int32, device=expert_ids.device)
        self._numbers = count_tokens(expert_ids, ranges, each, each[:-1], len(ranges))
        self._node, self._index = divmod(rank, len(ranges) // nodes - 1)
        self._nodes = nodes
        self._counted: OnItsWay | None = OnItsWay(expert_ids.device, lambda: self._numbers)
        self._on_host: dict[LinkKind, list[int]] = {}

    def count(self, meter: GroupMeter, purpose: str, unit: int) -> None:
        """Count `unit` bytes per token. The first call waits for the numbers, right after a dispatch that waited."""
        for link, tokens in self._tokens().items():
            if tokens:
                meter.meter.count(purpose, "all_to_all", link, sum(tokens) * unit, len(tokens))

    def _tokens(self) -> dict[LinkKind, list[int]]:
        """Numbers of tokens for each rank that receives any, by kind of link."""
        if self._counted is not None:
            rows = self._counted.wait().view(self._nodes, -1).tolist()
            self._counted = None
            between = [row[0] for node, row in enumerate(rows) if node != self._node]
            within = [count for row in rows for index, count in enumerate(row[1:]) if index != self._index]
            self._on_host = {"within": [n for n in within if n], "between": [n for n in between if n]}
        return self._on_host


def ranges_of(ranks: int, nodes: int, per_rank: int) -> Tensor:
    """First expert and end of each node and then of its ranks, node by node: int32 [nodes + ranks, 2]."""
    peers = ranks // nodes
    ranges: list[tuple[int, int]] = []
    for first in range(0, ranks, peers):
        ranges.append((first * per_rank, (first + peers) * per_rank))
        ranges += [(rank * per_rank, (rank + 1) * per_rank) for rank in range(first, first + peers)]
    return torch.tensor(ranges, dtype=torch.int32)
