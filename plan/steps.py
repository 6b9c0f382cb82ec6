"""Steps of a run: the samples of each step, and the number of steps. Both are the same for every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..configs.config import Config
from ..configs.sections import BatchConfig


@dataclass(frozen=True)
class Progress:
    """Steps, tokens and sequences that a run has trained; part of a checkpoint."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0

    def advanced(self, sequences: int, sequence_length: int) -> Progress:
        return Progress(self.step + 1, self.tokens + sequences * sequence_length, self.sequences + sequences)


def steps_from(progress: Progress, batch: BatchConfig) -> Iterator[tuple[Progress, int]]:
    """Yield for every step to come, without end, the progress before the step and the sequences of its global batch."""
    while True:
        sequences = batch.sequences_at(progress.tokens)
        yield progress, sequences
        progress = progress.advanced(sequences, batch.sequence_length)


def total_steps(config: Config) -> int:
    """Return the last step of the run: `train.steps`, or the step that reaches `train.tokens` if that is earlier."""
    most = config.train.steps
    if config.train.tokens is None:
        assert most is not None
        return most
    batch, wanted = config.batch, config.train.tokens
    for progress, sequences in steps_from(Progress(), batch):
        if progress.tokens >= wanted or progress.step == most:
            return progress.step
        if batch.ramp is None or progress.tokens >= batch.ramp.tokens:  # all steps to come are alike
            end = progress.step + math.ceil((wanted - progress.tokens) / (sequences * batch.sequence_length))
            return end if most is None else min(most, end)
    raise AssertionError("steps have no end")
