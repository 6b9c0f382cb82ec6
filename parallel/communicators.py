"""Communicators of a layout: the ranks of each, what it is for, and the rounds in which ranks make them.

Pure arithmetic for all ranks at once. `groups.py` makes the communicators of one rank from this list.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from ..comm.config import Purpose
from .layout import Layout, holder_rounds


class Communicator(NamedTuple):
    """A group of ranks with a queue of transfers of its own."""

    key: Hashable
    """Name of a dimension (`world`, `pp`, …), a channel (source, target), or replicas (kind, holders)."""
    purpose: Purpose
    name: str
    ranks: tuple[int, ...]
    """Ranks of the grid, ascending."""


class Round(NamedTuple):
    """Communicators that do not overlap, made at the same time.

    Only the members of a group make it. Torch names a group after its members and the number of groups that the process
    already has, so members with different numbers would wait for each other for ever. NCCL also splits the world's
    communicator with all ranks taking part. So a rank in none of `communicators` makes a placeholder in this round.
    """

    communicators: tuple[Communicator, ...]

    def of(self, rank: int) -> Communicator:
        """The communicator that `rank` makes."""
        found = next((each for each in self.communicators if rank in each.ranks), None)
        return found or _placeholder(rank)

    def all(self, world_size: int) -> Iterator[Communicator]:
        """All communicators of the round, placeholders included."""
        yield from self.communicators
        inside = {rank for each in self.communicators for rank in each.ranks}
        yield from (_placeholder(rank) for rank in range(world_size) if rank not in inside)


def _placeholder(rank: int) -> Communicator:
    return Communicator(None, "control", "placeholder", (rank,))


def communicator_rounds(
    layout: Layout,
    holders: Iterable[tuple[int, ...]] = (),
    links: Iterable[tuple[int, int]] = (),
    counts: bool = False,
) -> Iterator[Round]:
    """All rounds of a layout, in order. `holders` and `links`: see `Groups.create`.

    With `counts` the ranks of an expert parallel group have a second communicator, for the numbers of tokens: on NCCL
    these would else queue behind the tokens of the exchange before.
    """
    yield _round("world", "control", [range(layout.world_size)])
    yield _round("pp", "control", layout.pp_groups())
    yield _round("edp", "gradients", layout.edp_groups())
    yield _round("ep", "experts", layout.ep_groups())
    if counts:
        yield _round("counts", "counts", layout.ep_groups())
    yield _round("dp", "gradients", layout.dp_groups())
    for pairs in holder_rounds(links):
        for way in (1, -1):
            yield Round(tuple(each for pair in pairs for each in _channels(layout, *pair[::way])))
    for disjoint in holder_rounds(holders):
        for kind in ("dp", "edp"):
            yield Round(tuple(each for held in disjoint for each in _replicas(layout, kind, held)))


def _round(name: str, purpose: Purpose, groups: Iterable[Iterable[int]]) -> Round:
    return Round(tuple(Communicator(name, purpose, name, tuple(ranks)) for ranks in groups))


def _channels(layout: Layout, source: int, target: int) -> Iterator[Communicator]:
    """Two ranks with the same edp and ep coordinates each, on the pipeline ranks `source` and `target`."""
    name = f"from pipeline rank {source} to {target}"
    for edp in range(layout.edp):
        for ep in range(layout.ep):
            ranks = sorted(layout.rank(pp, edp, ep) for pp in (source, target))
            yield Communicator((source, target), "pipeline", name, tuple(ranks))


def _replicas(layout: Layout, kind: str, held: tuple[int, ...]) -> Iterator[Communicator]:
    """Ranks that hold the same parameter on the pipeline ranks `held`."""
    for ep in range(layout.ep if kind == "edp" else 1):
        ranks = layout.replica_ranks(layout.rank(held[0], 0, ep), kind, held)
        yield Communicator((kind, held), "gradients", f"{kind} of pipeline ranks {held}", tuple(ranks))
