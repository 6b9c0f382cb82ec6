"""GPipe (Huang et al. 2019, figure 2c): all forwards, a flush, all backwards in the opposite order."""

from __future__ import annotations

from .actions import Action, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """One stage a rank. Bubble (P-1)(F+B); every micro-batch is live at the flush."""
    microbatches = range(num_microbatches)
    return Schedule(
        name="gpipe",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        placement=tuple((rank,) for rank in range(num_ranks)),
        actions=tuple(
            (*(Action("F", rank, m) for m in microbatches), *(Action("B", rank, m) for m in reversed(microbatches)))
            for rank in range(num_ranks)
        ),
    )
