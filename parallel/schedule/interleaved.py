"""Interleaved 1F1B (Megatron-LM, Narayanan et al. 2021, figure 4): each rank holds several stages, P apart."""

from __future__ import annotations

from collections.abc import Iterator

from ...settings import UsageError
from .actions import Action, Schedule


def interleaved(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Rank r holds stages r, r + P, r + 2P, ... One stage per rank gives 1F1B.

    Micro-batches pass a rank's stages in groups of P. If P divides their number, the bubble is (P-1)(F+B) with the F
    and B of one stage: 1/v of 1F1B's bubble for v stages per rank. Otherwise the first group is smaller, and the order
    is the one of full groups without the missing micro-batches. This order ends sooner than with the gap in the last
    group, and sooner than 1F1B. (Groups of more than P, as other implementations form then, deadlock if a send blocks
    until it is received.)

    Raises UsageError for fewer than one stage per rank.
    """
    if stages_per_rank < 1:
        raise UsageError(f"stages_per_rank is {stages_per_rank}, but a rank holds at least 1 stage")
    ranks, num_stages = range(num_ranks), num_ranks * stages_per_rank
    return Schedule(
        name="interleaved",
        num_ranks=num_ranks,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        stages_of_rank=tuple(tuple(range(rank, num_stages, num_ranks)) for rank in ranks),
        actions=tuple(tuple(_order(rank, num_ranks, num_microbatches, stages_per_rank)) for rank in ranks),
    )


def _order(rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Iterator[Action]:
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    missing = -num_microbatches % num_ranks
    groups = [range(start, start + num_ranks) for start in range(-missing, num_microbatches, num_ranks)]
    forwards = [Action("F", stage, m) for group in groups for stage in stages for m in group]
    backwards = [Action("B", stage, m) for group in groups for stage in reversed(stages) for m in group]

    # Forwards until the first micro-batch has passed all but the last stage here, and 2 more for each rank below; with
    # one stage per rank 1 more is enough.
    below = (num_ranks - rank - 1) * (2 if stages_per_rank > 1 else 1)
    warmup = min((stages_per_rank - 1) * num_ranks + below, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += forward, backward
    order += backwards[len(forwards) - warmup :]
    return (action for action in order if action.microbatch >= 0)
