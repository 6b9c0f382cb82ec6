"""Moves of experts between ranks: of their master weights, moments and averages.

Every rank holds a shard of each of its experts, cut in the same way on all ranks. A shard therefore moves to the rank
with the same `pp` and `edp` coordinates, within its expert parallel group. Pipeline ranks that hold a stage in common
each do the same in their groups. E experts of a layer, E_local of them on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...comm.exchange import Exchange
from ...comm.meter import Meter
from ..optimizer.sharded import ShardedOptimizer
from .placement import Placement, places_of


@dataclass(frozen=True)
class Moves:
    """Sends and receives of one rank when a layer's placement changes, by places on the rank."""

    leaving: tuple[int, ...]
    """Places whose experts leave, ordered by their new place."""
    send_splits: list[int]
    """Number of experts that move to each rank, this one included: an expert may change its place on a rank."""
    arriving: tuple[int, ...]
    """Places that get another expert, in the order of arrival."""
    receive_splits: list[int]

    @classmethod
    def between(
        cls, before: Placement, after: Sequence[int], rank: int, num_ranks: int, every_place: bool = False
    ) -> Moves:
        """The part of `rank` in a change from a placement `[E]` to another, which may have replicas: `[P]`.

        Places whose expert stays take no part, unless `every_place` is to be filled.
        """
        each, each_after = len(before) // num_ranks, len(after) // num_ranks
        old = places_of(before)
        moved = [(old[expert], new) for new, expert in enumerate(after) if every_place or old[expert] != new]
        leaving = [(source, target) for source, target in moved if source // each == rank]
        arriving = [(source, target) for source, target in moved if target // each_after == rank]
        arriving.sort(key=lambda places: places[0] // each)
        return cls(
            tuple(source % each for source, _ in leaving),
            _splits([target // each_after for _, target in leaving], num_ranks),
            tuple(target % each_after for _, target in arriving),
            _splits([source // each for source, _ in arriving], num_ranks),
        )


@torch.no_grad()
def move_experts(
    optimizer: ShardedOptimizer,
    parameters: Sequence[nn.Parameter],
    before: Placement,
    after: Placement,
    group: dist.ProcessGroup,
    meter: Meter,
) -> int:
    """Move the optimizer's state of a layer's experts; returns the bytes that this rank sent to others.

    Every rank of the expert parallel `group` calls it between steps, with the parameters `[E_local, …]` of the layer in
    the same order. The parameters themselves change when the optimizer publishes; rename them before.
    """
    rank = group.rank()
    moves = Moves.between(before, after, rank, group.size())
    sent = 0
    for parameter in parameters:
        states = [shard.view(parameter.shape[0], -1) for shard in optimizer.shards(parameter)]
        # Sent as bytes, so that one message carries several formats.
        leaving = [state[list(moves.leaving)].view(torch.uint8).to(parameter.device) for state in states]
        rows = torch.cat(leaving, dim=1)
        received = _exchange(rows, moves, group, meter)
        widths = [state.shape[1] * state.itemsize for state in states]
        for state, part in zip(states, received.split(widths, dim=1), strict=True):
            state[list(moves.arriving)] = part.contiguous().view(state.dtype).to(state.device)
        sent += (len(rows) - moves.send_splits[rank]) * rows.shape[1]
    return sent


@torch.no_grad()
def copy_experts(
    weight: Tensor, before: Placement, after: Sequence[int], group: dist.ProcessGroup, meter: Meter
) -> Tensor:
    """Copy experts' weights `[E_local, …]` to the places `after` `[P]`: `[P / ranks, …]`, on every rank of `group`."""
    moves = Moves.between(before, after, group.rank(), group.size(), every_place=True)
    rows = weight.detach().flatten(1)[list(moves.leaving)]
    received = _exchange(rows, moves, group, meter)
    copies = torch.empty_like(received)
    copies[list(moves.arriving)] = received
    return copies.view(-1, *weight.shape[1:])


def _exchange(rows: Tensor, moves: Moves, group: dist.ProcessGroup, meter: Meter) -> Tensor:
    return Exchange(rows, moves.send_splits, moves.receive_splits, group, meter.group(group), "experts").wait()


def _splits(ranks: Sequence[int], num_ranks: int) -> list[int]:
    return [ranks.count(rank) for rank in range(num_ranks)]
