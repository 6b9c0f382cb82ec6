"""GPipe (Huang et al. 2019, figure 2c): all forwards, a flush, all backwards in the opposite order."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action, Schedule, one_stage_per_rank


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """A schedule of one stage per rank. Bubble (P-1)(F+B); every micro-batch is live at the flush."""

    def order(rank: int) -> Iterator[Action]:
        for m in range(num_microbatches):
            yield Action("F", rank, m)
        for m in reversed(range(num_microbatches)):
            yield Action("B", rank, m)

    return one_stage_per_rank("gpipe", num_ranks, num_microbatches, order)
