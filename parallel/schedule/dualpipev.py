"""DualPipeV (Sea AI Lab's "cut in half" of DualPipe): the pipeline folded to a V, with its turn on the last rank."""

from __future__ import annotations

from .actions import Schedule
from .eight_phases import Streams, adapt, eight_phases, padded


def dualpipev(num_ranks: int, num_microbatches: int, *, defer_weights: bool = False) -> Schedule:
    """Rank r holds the stages r and 2R-1-r. Bubble (R-1)(FB+B-3W), at most 2R+1 live (stage, micro-batch).

    All micro-batches enter at rank 0 and come back to it. A rank's second stream holds the same micro-batches on their
    way back; in DualPipe it holds the ones from the other end. With at least 2R micro-batches the order is the one of
    DeepSeek's public code; for fewer, and for `defer_weights`, see `dualpipe`.
    """
    ranks, last = range(num_ranks), 2 * num_ranks - 1
    stream = padded(range(num_microbatches), max(2 * num_ranks, num_microbatches))
    stages = tuple((rank, last - rank) for rank in ranks)
    actions = tuple(tuple(eight_phases(num_ranks, rank, Streams(stages[rank], (stream, stream)))) for rank in ranks)
    schedule = Schedule("dualpipev", num_ranks, 2 * num_ranks, num_microbatches, stages, actions)
    return adapt(schedule, num_ranks, defer_weights)
