"""Schedules that a run can make: one per number of micro-batches, in training and in evaluation.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..configs.config import Config
from ..parallel.layout import Layout
from ..parallel.schedule.choose import generate
from ..parallel.schedule.transfers import links
from ..settings import UsageError

LAST_NEW_FORM = 4
"""Micro-batches per pipeline rank above which a schedule changes only in length, no longer in form."""


def sizes_of_run(config: Config) -> list[int]:
    """Every size that a global batch has during the run, in sequences, ascending."""
    batch = config.batch
    if batch.ramp is None:
        return [batch.global_sequences]
    return [*range(batch.ramp.start, batch.global_sequences, batch.ramp.increment), batch.global_sequences]


def distinct_forms(counts: Iterable[int], pp: int) -> list[int]:
    """The numbers of micro-batches among `counts` that bring out every form of a schedule on `pp` ranks, ascending.

    These are the least, the most, and all up to LAST_NEW_FORM x pp: a ramp's thousands would take minutes.
    """
    ascending = sorted(set(counts))
    return [count for count in ascending if count in (ascending[0], ascending[-1]) or count <= LAST_NEW_FORM * pp]


def links_of_run(config: Config, layout: Layout) -> set[tuple[int, int]]:
    """Pairs of pipeline ranks, lower first, that send to each other in any schedule of the run.

    Evaluation has fewer micro-batches than `train.evaluate_sequences` make up where the held-out text is short.
    """
    if layout.pp == 1:
        return set()
    parallel = config.parallel
    counts = {_microbatches(config, layout, size) for size in sizes_of_run(config)}
    counts.update(range(1, _microbatches(config, layout, config.train.evaluate_sequences) + 1))
    used: set[tuple[int, int]] = set()
    for count in distinct_forms(counts, layout.pp):
        try:
            used |= links(generate(parallel.schedule, parallel.pp, count, parallel.schedule_options))
        except UsageError:  # a number that the schedule refuses is reported where a step needs it
            continue
    return used


def _microbatches(config: Config, layout: Layout, sequences: int) -> int:
    """Micro-batches of a pipeline, where the last one of a rank may be padded."""
    per_rank = math.ceil(sequences / layout.dp)
    return math.ceil(per_rank / config.batch.micro_sequences)
