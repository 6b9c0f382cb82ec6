"""Count of what this rank sends: bytes and messages by purpose, by collective and by kind of link."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist

LinkKind = Literal["within", "between"]
LINKS: tuple[LinkKind, ...] = ("within", "between")
"""Links inside a node and between nodes."""

PURPOSES: dict[str, tuple[str, ...]] = {
    "counts": ("all_to_all",),  # how many rows follow
    "dispatch": ("all_to_all",),  # tokens to their experts
    "combine": ("all_to_all",),  # the experts' outputs back
    "combine backward": ("all_to_all",),  # gradients to the experts
    "dispatch backward": ("all_to_all",),  # gradients back to the tokens
    "pipeline": ("send",),  # activations and gradients between stages
    "gradients": ("reduce_scatter", "all_to_all"),  # summed over replicas
    "weights": ("all_gather",),  # new weights to all replicas
    "experts": ("all_to_all",),  # experts that change their rank
    "statistics": ("all_reduce",),  # losses, loads, norms
}
"""Purposes of messages, each with its collectives, in the order of reports."""


@dataclass(frozen=True, order=True)
class Kind:
    """Class of messages: a key of PURPOSES, the collective, and the kind of link."""

    purpose: str
    collective: str
    link: LinkKind


@dataclass
class Tally:
    """Bytes of payload, without the overhead of network protocols, and number of messages."""

    bytes: int = 0
    messages: int = 0

    def add(self, bytes: int, messages: int = 1) -> None:
        self.bytes += bytes
        self.messages += messages


Traffic = dict[Kind, Tally]

KINDS = tuple(
    Kind(purpose, collective, link)
    for purpose, collectives in PURPOSES.items()
    for collective in collectives
    for link in LINKS
)
"""All kinds, so that ranks can add up their tallies without exchanging which kinds they have."""


def numbers_of(traffic: Traffic) -> list[int]:
    """Bytes and messages of every kind in KINDS, one after the other."""
    tallies = [traffic.get(kind, Tally()) for kind in KINDS]
    return [number for tally in tallies for number in (tally.bytes, tally.messages)]


def traffic_of(numbers: Sequence[int]) -> Traffic:
    """Inverse of `numbers_of`, without the kinds that have no messages."""
    tallies = zip(KINDS, numbers[::2], numbers[1::2], strict=True)
    return {kind: Tally(bytes, messages) for kind, bytes, messages in tallies if messages}


@dataclass
class Meter:
    """Count of the messages that one rank hands to the collective library.

    node_of: the node of every global rank.
    """

    node_of: Mapping[int, int]
    traffic: Traffic = field(default_factory=dict)

    def take(self) -> Traffic:
        """Return the traffic since the last call, and begin again at zero."""
        taken, self.traffic = self.traffic, {}
        return taken

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which no messages are counted."""
        before, self.traffic = self.traffic, {}
        try:
            yield
        finally:
            self.traffic = before

    def count(self, purpose: str, collective: str, link: LinkKind, bytes: int, messages: int = 1) -> None:
        assert collective in PURPOSES[purpose], (purpose, collective)
        self.traffic.setdefault(Kind(purpose, collective, link), Tally()).add(bytes, messages)

    def link(self, rank: int, other: int) -> LinkKind:
        """Kind of link between two global ranks."""
        return "within" if self.node_of[rank] == self.node_of[other] else "between"

    def group(self, group: dist.ProcessGroup | None) -> GroupMeter:
        """Meter for the ranks of a group, numbered as in the group."""
        if group is None:
            return GroupMeter(self, 0, ("within",))
        ranks = dist.get_process_group_ranks(group)
        here = ranks[group.rank()]
        return GroupMeter(self, group.rank(), tuple(self.link(here, other) for other in ranks))


@dataclass(frozen=True)
class GroupMeter:
    """Count of what this rank sends in one group, added to the rank's meter."""

    meter: Meter
    rank: int
    links: tuple[LinkKind, ...]
    """Kind of link from this rank to each rank of the group."""

    def all_to_all(self, purpose: str, splits: Iterable[int], unit: int) -> None:
        """Count an all-to-all of `splits[r]` units of `unit` bytes for rank r; without units there is no message."""
        for rank, (link, units) in enumerate(zip(self.links, splits, strict=True)):
            if units and rank != self.rank:
                self.meter.count(purpose, "all_to_all", link, units * unit)

    def send(self, purpose: str, target: int, bytes: int) -> None:
        """Count a message to one rank of the group."""
        self.meter.count(purpose, "send", self.links[target], bytes)

    def reduce_scatter(self, purpose: str, shard: int) -> None:
        """Count a reduce-scatter of shards of `shard` bytes, one for each rank."""
        self._ring(purpose, "reduce_scatter", shard, 1)

    def all_gather(self, purpose: str, shard: int) -> None:
        """Count an all-gather of shards of `shard` bytes, one from each rank."""
        self._ring(purpose, "all_gather", shard, 1)

    def all_reduce(self, purpose: str, whole: int) -> None:
        """Count an all-reduce of `whole` bytes as a reduce-scatter and an all-gather."""
        self._ring(purpose, "all_reduce", -(-whole // len(self.links)), 2)

    def _ring(self, purpose: str, collective: str, shard: int, rounds: int) -> None:
        """Count rings in which each rank passes one shard per other rank to the next rank: the least possible.

        Libraries may take other routes between the ranks; a ring has the fewest crossings between nodes.
        """
        others = len(self.links) - 1
        if others:
            following = self.links[(self.rank + 1) % len(self.links)]
            self.meter.count(purpose, collective, following, rounds * others * shard, rounds * others)
