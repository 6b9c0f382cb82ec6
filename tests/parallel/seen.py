"""Records of the sharded optimizer's collectives: launches, bytes and waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from counterflow.parallel.optimizer import bucket
from counterflow.parallel.optimizer.collectives import Collective


@dataclass(frozen=True)
class Launch:
    """A collective that this rank began."""

    kind: Literal["reduce", "gather"]
    ranks: tuple[int, ...]
    """Ranks of the collective's group."""
    elements: int
    """Elements of all shards together."""
    sent: int
    """Bytes that this rank sends: every shard but its own, or its own to every other rank."""


@dataclass
class Seen:
    """Collectives in the order of their launches, and `events`: launches by number, waits by its negative."""

    launches: list[Launch] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    """Numbers: 1 for the first launch, -1 for its wait."""

    def of(self, kind: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kind == kind]

    def note(self, kind: Literal["reduce", "gather"], group: dist.ProcessGroup, elements: int, sent: int) -> int:
        self.launches.append(Launch(kind, tuple(dist.get_process_group_ranks(group)), elements, sent))
        self.events.append(len(self.launches))
        return len(self.launches)

    def watched(self, collective: Collective, number: int) -> Collective:
        """Make `collective` record its wait."""
        wait = collective.wait

        def recording_wait() -> Tensor:
            self.events.append(-number)
            return wait()

        collective.wait = recording_wait  # type: ignore[method-assign]
        return collective


@contextmanager
def recorded() -> Iterator[Seen]:
    """Record the collectives that optimizers of this rank begin."""
    seen = Seen()
    reduce, gather = bucket.begin_reduce_scatter, bucket.begin_all_gather

    def begin_reduce_scatter(pieces: Tensor, into: Tensor, group: Any, meter: Any) -> Collective:
        others = (len(pieces) - 1) * pieces.shape[1] * pieces.element_size()
        number = seen.note("reduce", group, pieces.numel(), others)
        return seen.watched(reduce(pieces, into, group, meter), number)

    def begin_all_gather(shard: Tensor, group: Any, meter: Any) -> Collective:
        others = (group.size() - 1) * shard.numel() * shard.element_size()
        number = seen.note("gather", group, group.size() * shard.numel(), others)
        return seen.watched(gather(shard, group, meter), number)

    with (
        patch.object(bucket, "begin_reduce_scatter", begin_reduce_scatter),
        patch.object(bucket, "begin_all_gather", begin_all_gather),
    ):
        yield seen
