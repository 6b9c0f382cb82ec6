"""1F1B (PipeDream-Flush, Narayanan et al. 2021): as GPipe, but each rank begins backwards as early as it can."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .actions import Action, Schedule, one_stage_per_rank


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """A schedule of one stage per rank. Bubble (P-1)(F+B) as GPipe, but rank r holds at most P - r micro-batches."""
    return one_stage_per_rank("1f1b", num_ranks, num_microbatches, partial(alternate, num_ranks, num_microbatches))


def alternate(num_ranks: int, num_microbatches: int, rank: int) -> Iterator[Action]:
    """The order of one rank: forwards until a micro-batch is back, then forward and backward in turn."""
    warmup = min(num_ranks - rank - 1, num_microbatches)
    for m in range(warmup):
        yield Action("F", rank, m)
    for m in range(warmup, num_microbatches):
        yield Action("F", rank, m)
        yield Action("B", rank, m - warmup)
    for m in range(num_microbatches - warmup, num_microbatches):
        yield Action("B", rank, m)
