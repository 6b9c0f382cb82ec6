"""How parameters are cut for ZeRO-1: each global tensor by rows over the ranks that hold it.

A bucket is a set of parameters that are reduced in one collective. Its gradients lie in memory parameter by
parameter; its shards lie rank by rank, because that is what reduce-scatter and all-gather exchange. This file is the
arithmetic between the two. R ranks, N rows of a global tensor, C columns, G global tensors in a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ...local_parameter import LocalParameter, Replicas

_Key = tuple[Replicas, tuple[int, ...], bool]  # replicas, holders, decayed


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a bucket."""

    placed: LocalParameter
    ranks: int
    start: int
    """Offset in the bucket's parameter-by-parameter layout."""
    shard_start: int
    """Offset in each rank's shard."""

    @property
    def rows(self) -> int:
        return self.placed.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.placed.shape[1:])

    @property
    def rows_per_rank(self) -> int:
        """Rows of each global tensor on one rank; the last ranks may have fewer, and padding instead."""
        return -(-self.rows // self.ranks)

    @property
    def numel(self) -> int:
        return self.placed.parameter.numel()

    @property
    def shard_numel(self) -> int:
        return len(self.placed.names) * self.rows_per_rank * self.columns

    def owned(self, rank: int) -> range:
        """Rows of each global tensor that `rank` owns."""
        first = min(self.rows, rank * self.rows_per_rank)
        return range(first, min(self.rows, first + self.rows_per_rank))

    def in_bucket(self, flat: Tensor) -> Tensor:
        """This parameter in a parameter-by-parameter bucket `[P]`, as `[G, N, C]`."""
        return flat[self.start : self.start + self.numel].view(len(self.placed.names), self.rows, self.columns)

    def in_shard(self, shard: Tensor) -> Tensor:
        """This parameter in one rank's shard, as `[G, rows_per_rank, C]`."""
        piece = shard[self.shard_start : self.shard_start + self.shard_numel]
        return piece.view(len(self.placed.names), self.rows_per_rank, self.columns)


@dataclass(frozen=True)
class Plan:
    """The layout of one bucket."""

    slots: tuple[Slot, ...]
    replicas: Replicas
    holders: tuple[int, ...]
    decayed: bool
    ranks: int
    position: int
    """Of its first parameter among all that are placed: backward reaches it last, and then the bucket is complete."""

    @property
    def numel(self) -> int:
        return self.slots[-1].start + self.slots[-1].numel

    @property
    def shard_numel(self) -> int:
        return self.slots[-1].shard_start + self.slots[-1].shard_numel

    def to_shards(self, flat: Tensor, shards: Tensor) -> None:
        """Copy a bucket `[P]` into `[R, shard]`; padding rows become zero."""
        for slot in self.slots:
            source = slot.in_bucket(flat)
            for rank in range(self.ranks):
                rows = slot.owned(rank)
                target = slot.in_shard(shards[rank])
                target[:, : len(rows)] = source[:, rows.start : rows.stop]
                target[:, len(rows) :].zero_()

    def from_shards(self, shards: Tensor) -> None:
        """Copy `[R, shard]` into the parameters themselves."""
        for slot in self.slots:
            # Not `.data`: the parameter's version tells those who hold a quantised copy of it.
            target = slot.placed.parameter.detach().view(len(slot.placed.names), slot.rows, slot.columns)
            for rank in range(self.ranks):
                rows = slot.owned(rank)
                target[:, rows.start : rows.stop] = slot.in_shard(shards[rank])[:, : len(rows)]


def plan_buckets(
    placed: Iterable[LocalParameter], ranks: Callable[[LocalParameter], int], bucket_numel: int
) -> list[Plan]:
    """Group parameters into buckets of about `bucket_numel` elements, in the order of their first parameters.

    One bucket has one set of `ranks(placed)` ranks and one decay, and takes its parameters in the given order, which
    is the model's: neighbours get their last gradients at about the same time. Replicas that are given the same
    parameters in the same order plan the same buckets.
    """
    open_slots: dict[_Key, list[Slot]] = {}
    starts: dict[_Key, int] = {}
    plans: list[Plan] = []
    seen: set[nn.Parameter] = set()

    def close(key: _Key) -> None:
        slots = tuple(open_slots.pop(key))
        plans.append(Plan(slots, *key, slots[0].ranks, starts[key]))

    for position, item in enumerate(placed):
        assert item.parameter not in seen, f"{item.names[0]} is placed twice"
        seen.add(item.parameter)
        key = (item.replicas, item.holders, len(item.shape) > 1)
        slots = open_slots.setdefault(key, [])
        start, shard_start = 0, 0
        if slots:
            start, shard_start = slots[-1].start + slots[-1].numel, slots[-1].shard_start + slots[-1].shard_numel
        else:
            starts[key] = position
        slots.append(Slot(item, ranks(item), start, shard_start))
        if start + slots[-1].numel >= bucket_numel:
            close(key)
    for key in list(open_slots):
        close(key)
    return sorted(plans, key=lambda plan: plan.position)
