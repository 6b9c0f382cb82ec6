"""ZB1P, the ZB-H1 of "Zero Bubble Pipeline Parallelism" (Qi et al. 2023): 1F1B with deferred weight gradients."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action, Schedule, one_stage_per_rank
from .one_f_one_b import alternate


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """A schedule of one stage per rank, B split into I and W. Bubble (P-1)(F+B-2W) where F = I = W.

    Rank r would hold P - r micro-batches in 1F1B. Here its W lag r micro-batches behind their I, so every rank holds P:
    gradients reach the rank before sooner, and the W fill the bubble.
    """

    def order(rank: int) -> Iterator[Action]:
        for action in alternate(num_ranks, num_microbatches, rank):
            if action.kind == "F":
                yield action
            else:
                yield action._replace(kind="I")
                if action.microbatch >= rank:
                    yield Action("W", rank, action.microbatch - rank)
        for m in range(max(num_microbatches - rank, 0), num_microbatches):
            yield Action("W", rank, m)

    return one_stage_per_rank("zb1p", num_ranks, num_microbatches, order)
