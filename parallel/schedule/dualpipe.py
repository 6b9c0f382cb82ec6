"""DualPipe (DeepSeek-V3 §3.2.1, figure 5): micro-batches enter at both ends of the pipeline and pass each other."""

from __future__ import annotations

from collections.abc import Iterator

from ...settings import UsageError
from .actions import Action, Overlap, Schedule
from .eight_phases import Streams, adapt, eight_phases, padded


def dualpipe(num_ranks: int, num_microbatches: int, *, defer_weights: bool = False) -> Schedule:
    """Stage s on the ranks s and P-1-s. Bubble (P/2-1)(FB+B-3W), at most P+1 live micro-batches.

    The first half of the micro-batches, rounded up, enters at rank 0, the others at rank P-1. With an even number of
    at least 2P micro-batches the order is the one of DeepSeek's public code, with W split off in the same places. With
    fewer, or an odd number, the missing micro-batches are left out, and backwards outside pairs are split so that their
    W fill the gaps. At the costs of V3's table the bubble then stays the same down to P + 1 micro-batches, except for
    up to one pair more if their number is odd. With fewer than P + 1 the way through the pipeline is most of the step.

    `defer_weights` takes the W out of the pairs too: a pair is then an F and an I, and the W runs where a rank would
    wait. No more micro-batches are live. Whether the step is faster depends on how much a pair without its W still
    hides; the simulation assumes as much as with the W, which is optimistic.

    Raises UsageError for an odd number of ranks.
    """
    if num_ranks % 2:
        even = " or ".join(str(count) for count in (num_ranks - 1, num_ranks + 1) if count)
        raise UsageError(
            f"dualpipe needs an even number of pipeline ranks, as stage s lies on two of them, got {num_ranks}: "
            f"take {even}, or dualpipev, which runs on any number"
        )
    half, last = num_ranks // 2, num_ranks - 1
    from_first = range((num_microbatches + 1) // 2)
    from_last = range(len(from_first), num_microbatches)

    def order(rank: int) -> Iterator[Action | Overlap]:
        depth = min(rank, last - rank)
        near, far = (from_first, from_last) if rank < half else (from_last, from_first)
        length = max(2 * half, len(from_first))
        return eight_phases(half, depth, Streams((depth, last - depth), (padded(near, length), padded(far, length))))

    ranks = range(num_ranks)
    stages, actions = tuple((rank, last - rank) for rank in ranks), tuple(tuple(order(rank)) for rank in ranks)
    schedule = Schedule("dualpipe", num_ranks, num_ranks, num_microbatches, stages, actions)
    return adapt(schedule, half, defer_weights)
