"""Ranks of a group by node, and the ranks that pass tokens on between nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


class NodeMap:
    """Position of one rank among the nodes of its group, and tables of it on the device.

    Args:
        nodes: nodes of the group's ranks.
        rank: this rank of the group.
        per_rank: experts of each rank.
    """

    def __init__(self, nodes: Nodes, rank: int, per_rank: int) -> None:
        self.nodes, self.rank, self.per_rank = nodes, rank, per_rank
        self.members = nodes.members(nodes.of[rank])
        """Ranks of this node."""
        self.relays = [nodes.relay(rank, node) for node in range(nodes.count)]
        """Relays of this rank, by node."""
        self.clients = {member: nodes.clients(member) for member in self.members}
        """Ranks that each rank of this node relays for."""
        self.counts_sent = [per_rank + len(nodes.members(node)) + 1 for node in nodes.of]
        """Counts that this rank sends to each rank."""
        self.counts_received = per_rank + len(self.members) + 1
        """Counts that this rank receives from each rank: rows of its experts, tokens for the ranks of its node, tokens
        for its node."""
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def arrival(self) -> list[int]:
        """Ranks in the order in which their tokens arrive here: by relay, and then by source."""
        return [source for member in self.members for source in self.clients[member]]

    def node_of(self, device: torch.device) -> Tensor:
        """Node of each rank, int64 [G]."""
        return self.table("node of rank", device, lambda: torch.tensor(self.nodes.of))

    def table(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Table of this name, made and copied to a device once only, as the host waits for the copy."""
        if (name, device) not in self._tables:
            self._tables[name, device] = make().to(device)
        return self._tables[name, device]
