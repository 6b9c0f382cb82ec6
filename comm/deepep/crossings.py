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

from ..meter import GroupMeter, LinkKind

BYTES_PER_CHOICE = 4 + 4
"""Bytes sent to the experts per choice of a token, in addition to the token: the expert's number and its weight."""


class Crossings:
    """Numbers of tokens of this rank that one dispatch sends to each node and rank.

    Args:
        expert_ids: [T, K], -1 is sent nowhere.
        rank, ranks: this rank in its group, and the size of the group.
        nodes: number of nodes of the group, equally many ranks on each.
        per_rank: experts per rank.
    """

    def __init__(self, expert_ids: Tensor, rank: int, ranks: int, nodes: int, per_rank: int) -> None:
        to = torch.div(expert_ids, per_rank, rounding_mode="floor").masked_fill(expert_ids < 0, ranks).long()
        wanted = torch.zeros(to.shape[0], ranks + 1, dtype=torch.bool, device=to.device)
        wanted = wanted.scatter_(1, to, True)[:, :ranks].view(to.shape[0], nodes, ranks // nodes)
        to_node, to_rank = wanted.any(2).sum(0), wanted.sum(0)
        self._node, self._index = divmod(rank, ranks // nodes)
        self._on_device: Tensor | None = torch.cat((to_node[:, None], to_rank), 1)
        self._on_host: dict[LinkKind, list[int]] = {}

    def count(self, meter: GroupMeter, purpose: str, unit: int) -> None:
        """Count `unit` bytes per token. The first call waits for the device, right after a dispatch that waited too."""
        for link, tokens in self._tokens().items():
            if tokens:
                meter.meter.count(purpose, "all_to_all", link, sum(tokens) * unit, len(tokens))

    def _tokens(self) -> dict[LinkKind, list[int]]:
        """Numbers of tokens for each rank that receives any, by kind of link."""
        if self._on_device is not None:
            rows = self._on_device.tolist()
            self._on_device = None
            between = [row[0] for node, row in enumerate(rows) if node != self._node]
            within = [count for row in rows for index, count in enumerate(row[1:]) if index != self._index]
            self._on_host = {"within": [n for n in within if n], "between": [n for n in between if n]}
        return self._on_host
