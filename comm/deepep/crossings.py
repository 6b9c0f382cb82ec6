"""What DeepEP sends, counted from the routing: its kernels keep no count of bytes.

A token crosses to each node it needs once, to the GPU with the sender's local index, and inside the node once to each
other rank that has some of its experts; combine goes the same way back. So `comm/two_hop.py` sends as well, whose
counts these are, but for two things:

- A rank counts all that its tokens make travel, also what is passed on inside other nodes, where two-hop counts at
  the rank that sends. Over a group the sums are equal.
- With a token DeepEP sends its experts and weights in 4 bytes each, two-hop in 2 and 4 and filled up to 16.

Left out are the counts of tokens, the numbers of their places (some bytes a token), and that DeepEP sends in pieces of
a few tokens: a message here is all that goes to one rank. A GPU's domain of fast links is taken to be its node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..meter import GroupMeter, LinkKind

BESIDES = 4 + 4
"""Bytes of one choice that travel to the experts beside the token: the expert's number and its weight."""


class Crossings:
    """How many tokens of this rank go where in one dispatch.

    Args:
        expert_ids: [T, K], -1 is sent nowhere.
        rank, ranks: this rank in its group, and the size of that.
        nodes: how many nodes the group is on, equally many ranks on each.
        per_rank: experts of a rank.
    """

    def __init__(self, expert_ids: Tensor, rank: int, ranks: int, nodes: int, per_rank: int) -> None:
        place = torch.div(expert_ids, per_rank, rounding_mode="floor").masked_fill(expert_ids < 0, ranks).long()
        wanted = torch.zeros(place.shape[0], ranks + 1, dtype=torch.bool, device=place.device)
        wanted = wanted.scatter_(1, place, True)[:, :ranks].view(place.shape[0], nodes, ranks // nodes)
        to_node, to_rank = wanted.any(2).sum(0), wanted.sum(0)
        self._node, self._index = divmod(rank, ranks // nodes)
        self._on_device: Tensor | None = torch.cat((to_node[:, None], to_rank), 1)
        self._on_host: dict[LinkKind, list[int]] = {}

    def count(self, meter: GroupMeter, purpose: str, unit: int) -> None:
        """`unit` bytes a token. Waits for the device the first time, right after a dispatch did so anyway."""
        for link, tokens in self._tokens().items():
            if tokens:
                meter.meter.count(purpose, "all_to_all", link, sum(tokens) * unit, len(tokens))

    def _tokens(self) -> dict[LinkKind, list[int]]:
        """Of every rank that is sent some."""
        if self._on_device is not None:
            rows = self._on_device.tolist()
            self._on_device = None
            between = [row[0] for node, row in enumerate(rows) if node != self._node]
            within = [count for row in rows for index, count in enumerate(row[1:]) if index != self._index]
            self._on_host = {"within": [n for n in within if n], "between": [n for n in between if n]}
        return self._on_host
