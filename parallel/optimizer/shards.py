"""Shards of parameters for ZeRO-1: each global tensor is cut by rows over the ranks that hold it.

A bucket is a set of parameters that are reduced in one collective. Its gradients lie in memory parameter by
parameter; its shards lie rank by rank, as reduce-scatter and all-gather exchange them. This file is the arithmetic
between the two. R ranks, N rows of a global tensor, C columns, G global tensors in a parameter.
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
    """Location of a parameter in a bucket."""

    local: LocalParameter
    ranks: int
    start: int
    """Offset in the bucket's parameter-by-parameter layout."""
    shard_start: int
    """Offset in each rank's shard."""

    @property
    def rows(self) -> int:
        return self.local.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.local.shape[1:])

    @property
    def rows_per_rank(self) -> int:
        """Rows of each global tensor on one rank; on the last ranks some of them may be padding."""
        return -(-self.rows // self.ranks)

    @property
    def numel(self) -> int:
        return self.local.parameter.numel()

    @property
    def shard_numel(self) -> int:
        return len(self.local.names) * self.rows_per_rank * self.columns

    def owned(self, rank: int) -> range:
        """Rows of each global tensor that `rank` owns."""
        first = min(self.rows, rank * self.rows_per_rank)
        return range(first, min(self.rows, first + self.rows_per_rank))

    def in_bucket(self, flat: Tensor) -> Tensor:
        """View of this parameter in a parameter-by-parameter bucket `[P]`, as `[G, N, C]`."""
        return flat[self.start : self.start + self.numel].view(len(self.local.names), self.rows, self.columns)

    def in_shard(self, shard: Tensor) -> Tensor:
        """View of this parameter in one rank's shard, as `[G, rows_per_rank, C]`."""
        piece = shard[self.shard_start : self.shard_start + self.shard_numel]
        return piece.view(len(self.local.names), self.rows_per_rank, self.columns)

    def pack(self, parameter: Tensor, shards: Tensor) -> None:
        """Copy `parameter` `[G, N, C]` into its place in `shards` `[R, shard]`; padding rows become zero."""
        whole, rest = self._split(parameter)
        pieces = self._in_shards(shards)
        ranks, left = len(whole), rest.shape[1]
        pieces[:ranks] = whole
        if ranks < self.ranks:
            if left:
                pieces[ranks, :, :left] = rest
            pieces[ranks, :, left:].zero_()
            pieces[ranks + 1 :].zero_()

    def unpack(self, shards: Tensor, parameter: Tensor) -> None:
        """Copy this parameter from its place in `shards` `[R, shard]` into `parameter` `[G, N, C]`."""
        whole, rest = self._split(parameter)
        pieces = self._in_shards(shards)
        ranks, left = len(whole), rest.shape[1]
        whole.copy_(pieces[:ranks])
        if left:
            rest.copy_(pieces[ranks, :, :left])

    def _split(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Views of `[G, N, C]`: the rows of ranks without padding, `[ranks, G, rows_per_rank, C]`, and the rest."""
        ranks = self.rows // self.rows_per_rank
        rows = ranks * self.rows_per_rank
        return parameter[:, :rows].unflatten(1, (ranks, self.rows_per_rank)).transpose(0, 1), parameter[:, rows:]

    def _in_shards(self, shards: Tensor) -> Tensor:
        """View of this parameter in the shards `[R, shard]` of all ranks, as `[R, G, rows_per_rank, C]`."""
        pieces = shards[:, self.shard_start : self.shard_start + self.shard_numel]
        return pieces.unflatten(1, (len(self.local.names), self.rows_per_rank, self.columns))


@dataclass(frozen=True)
class Plan:
    """The layout of one bucket."""

    slots: tuple[Slot, ...]
    replicas: Replicas
    holders: tuple[int, ...]
    decayed: bool
    ranks: int
    position: int
    """Index of the bucket's first parameter among all. Backward reaches it last and then the bucket is complete."""

    @property
    def numel(self) -> int:
        return self.slots[-1].start + self.slots[-1].numel

    @property
    def shard_numel(self) -> int:
        return self.slots[-1].shard_start + self.slots[-1].shard_numel

    @property
    def in_shard_order(self) -> bool:
        """Whether the gradients of the bucket lie as its shards do, so that they need not be packed."""
        slot = self.slots[0]
        return len(self.slots) == len(slot.local.names) == 1 and slot.rows % self.ranks == 0

    def to_shards(self, flat: Tensor, shards: Tensor) -> None:
        """Copy a bucket `[P]` into `[R, shard]`; padding rows become zero."""
        for slot in self.slots:
            slot.pack(slot.in_bucket(flat), shards)

    def from_shards(self, shards: Tensor) -> None:
        """Copy `[R, shard]` into the parameters themselves."""
        for slot in self.slots:
            # Not `.data`, which keeps the parameter's version: holders of a quantised copy compare versions.
            slot.unpack(shards, slot.local.parameter.detach().view(len(slot.local.names), slot.rows, slot.columns))


def plan_buckets(
    parameters: Iterable[LocalParameter], ranks: Callable[[LocalParameter], int], bucket_numel: int
) -> list[Plan]:
    """Group parameters into buckets of about `bucket_numel` elements, in the order of their first parameters.

    The parameters of a bucket have one set of replicas, of `ranks(parameter)` ranks, and are all decayed or all not.
    They come in the given order, the model's: neighbours get their last gradients at about the same time. Replicas with
    the same parameters in the same order plan the same buckets.
    """
    open_slots: dict[_Key, list[Slot]] = {}
    starts: dict[_Key, int] = {}
    plans: list[Plan] = []
    seen: set[nn.Parameter] = set()

    def close(key: _Key) -> None:
        slots = tuple(open_slots.pop(key))
        plans.append(Plan(slots, *key, slots[0].ranks, starts[key]))

    for position, local in enumerate(parameters):
        assert local.parameter not in seen, f"{local.names[0]} is listed twice"
        seen.add(local.parameter)
        key = (local.replicas, local.holders, len(local.shape) > 1)
        slots = open_slots.setdefault(key, [])
        start, shard_start = 0, 0
        if slots:
            start, shard_start = slots[-1].start + slots[-1].numel, slots[-1].shard_start + slots[-1].shard_numel
        else:
            starts[key] = position
        slots.append(Slot(local, ranks(local), start, shard_start))
        if start + slots[-1].numel >= bucket_numel:
            close(key)
    for key in list(open_slots):
        close(key)
    return sorted(plans, key=lambda plan: plan.position)
