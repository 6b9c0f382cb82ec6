"""The rank grid: which rank holds which slice of the model and of the batch.

Pure arithmetic without `torch.distributed`, so a layout of 16,384 ranks costs nothing.
Ranks are counted with `ep` fastest (an expert parallel group fills a node first), then `edp`, then `pp`:
`rank = (pp_index * edp + edp_index) * ep + ep_index`. DeepSeek-V3: 2048 = pp 16 x edp 2 x ep 64 (V3 §3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..settings import UsageError, nearest_multiples


class Coordinates(NamedTuple):
    """Position of a rank in the grid."""

    pp: int
    edp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """A grid pp x edp x ep of `world_size` ranks. Raises UsageError with the nearest sizes if no such grid exists."""

    world_size: int
    pp: int = 1
    ep: int = 1
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("world_size", "pp", "ep", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1")
        unit = self.pp * self.ep
        if self.world_size % unit:
            sizes = nearest_multiples(self.world_size, unit)
            degrees = [ep for ep in range(1, self.ep + 1) if self.world_size % (self.pp * ep) == 0]
            also = f", or parallel.ep {degrees[-1]}" if degrees else ""
            ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
            raise UsageError(
                f"{ranks} cannot be laid out as pp {self.pp} x ep {self.ep}: "
                f"the number of ranks must be a multiple of {unit}; nearest that work: {sizes} ranks{also}"
            )

    @classmethod
    def resolve(cls, world_size: int, pp: int, ep: int, dp: int | str, gpus_per_node: int) -> Layout:
        """Return the layout of a `parallel` section on `world_size` ranks; `dp` may be "auto"."""
        if isinstance(dp, int):
            if dp % ep:
                raise UsageError(
                    f"parallel.dp {dp} is not a multiple of parallel.ep {ep} (dp = ep x edp); "
                    f"nearest that work: dp {nearest_multiples(dp, ep)}"
                )
            if pp * dp != world_size:
                there_are = "there is 1" if world_size == 1 else f"there are {world_size}"
                raise UsageError(
                    f"parallel.pp {pp} x parallel.dp {dp} needs {pp * dp} ranks, but {there_are}: "
                    f"start {pp * dp} ranks, or set parallel.dp to auto"
                )
        return cls(world_size, pp, ep, gpus_per_node)

    @property
    def edp(self) -> int:
        """Data parallel replicas of an expert."""
        return self.world_size // (self.pp * self.ep)

    @property
    def dp(self) -> int:
        """Data parallel replicas of every parameter outside the experts."""
        return self.ep * self.edp

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.gpus_per_node)

    def coordinates(self, rank: int) -> Coordinates:
        rest, ep = divmod(rank, self.ep)
        pp, edp = divmod(rest, self.edp)
        return Coordinates(pp, edp, ep)

    def rank(self, pp: int, edp: int, ep: int) -> int:
        return (pp * self.edp + edp) * self.ep + ep

    def node(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def ep_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the experts of one replica of a stage and exchange tokens."""
        for first in range(0, self.world_size, self.ep):
            yield list(range(first, first + self.ep))

    def edp_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the same experts: expert gradients are summed over these."""
        for pp in range(self.pp):
            for ep in range(self.ep):
                yield [self.rank(pp, edp, ep) for edp in range(self.edp)]

    def dp_groups(self) -> Iterator[list[int]]:
        """Ranks that hold the same stage: gradients outside the experts are summed over these."""
        for first in range(0, self.world_size, self.dp):
            yield list(range(first, first + self.dp))

    def pp_groups(self) -> Iterator[list[int]]:
        """Ranks that together hold one whole model replica, in stage order."""
        for edp in range(self.edp):
            for ep in range(self.ep):
                yield [self.rank(pp, edp, ep) for pp in range(self.pp)]

    def replica_ranks(self, rank: int, kind: str, holders: Iterable[int]) -> list[int]:
        """Ranks that hold the same values as `rank` of a parameter on the pipeline ranks `holders`, itself included.

        `dp`: every rank of these pipeline ranks; `edp`, for experts: ranks with the same `ep` coordinate. Ascending,
        so `pp` runs slowest. `rank` must be on one of `holders`.
        """
        at, held_on = self.coordinates(rank), tuple(holders)
        assert kind in ("dp", "edp"), kind
        assert at.pp in held_on, f"rank {rank} has pipeline rank {at.pp}, which is not one of the holders {held_on}"
        experts = range(self.ep) if kind == "dp" else (at.ep,)
        return [self.rank(pp, edp, ep) for pp in sorted(held_on) for edp in range(self.edp) for ep in experts]


def holder_rounds(holders: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """The sets of two and more pipeline ranks in `holders`, packed into rounds of sets that do not overlap.

    In each round a rank makes at most one group. The result does not depend on the order of `holders`.
    """
    rounds: list[list[tuple[int, ...]]] = []
    for held in sorted({tuple(sorted(set(held))) for held in holders}):
        if len(held) > 1:
            free = (sets for sets in rounds if not any(set(held) & set(other) for other in sets))
            sets = next(free, None)
            if sets is None:
                rounds.append(sets := [])
            sets.append(held)
    return rounds
