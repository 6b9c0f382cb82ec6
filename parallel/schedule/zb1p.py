"""ZB1P, the ZB-H1 of "Zero Bubble Pipeline Parallelism" (Qi et al. 2023): 1F1B with the weight gradients put off."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action, Schedule


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """One stage a rank, B split in I and W. Bubble (P-1)(F+B-2W) where F = I = W.

    Rank r would hold P - r micro-batches in 1F1B. Here its W lag r micro-batches behind their I, so every rank holds P:
    the I hurry on to the rank before, and the W fill what was bubble.
    """
    return Schedule(
        name="zb1p",
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
    for m in range(num_microbatches):
        if m + warmup < num_microbatches:
            yield Action("F", rank, m + warmup)
        yield Action("I", rank, m)
        if m >= rank:
            yield Action("W", rank, m - rank)
    for m in range(max(num_microbatches - rank, 0), num_microbatches):
        yield Action("W", rank, m)
