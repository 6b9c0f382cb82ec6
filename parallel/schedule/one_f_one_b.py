"""1F1B (PipeDream-Flush, Narayanan et al. 2021): as GPipe, but each rank begins backwards as early as it can."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action, Schedule


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One stage a rank. Bubble (P-1)(F+B) as GPipe, but rank r holds at most P - r micro-batches."""
    return Schedule(
        name="1f1b",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        placement=tuple((rank,) for rank in range(num_ranks)),
        actions=tuple(tuple(_rank(rank, num_ranks, num_microbatches)) for rank in range(num_ranks)),
    )


def _rank(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    warmup = min(num_ranks - rank - 1, num_microbatches)
    for m in range(warmup):
        yield Action("F", rank, m)
    for m in range(warmup, num_microbatches):
        yield Action("F", rank, m)
        yield Action("B", rank, m - warmup)
    for m in range(num_microbatches - warmup, num_microbatches):
        yield Action("B", rank, m)
