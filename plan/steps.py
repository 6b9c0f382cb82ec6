"""The steps of a run: which samples each takes, and how many there are. The same for every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..configs.config import Config
from ..configs.sections import BatchConfig


@dataclass(frozen=True)
class Progress:
    """How far a run has come; a checkpoint carries it."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0

    def advanced(self, sequences: int, sequence_length: int) -> Progress:
        return Progress(self.step + 1, self.tokens + sequences * sequence_length, self.sequences + sequences)


def steps_from(progress: Progress, batch: BatchConfig) -> Iterator[tuple[Progress, int]]:
    """Every step to come, without end: the progress before it and the sequences of its global batch."""
    while True:
        sequences = batch.sequences_at(progress.tokens)
        yield progress, sequences
        progress = progress.advanced(sequences, batch.sequence_length)


def total_steps(config: Config) -> int:
    """The step at which the run ends: `train.steps`, or the first that reaches `train.tokens`, whichever is first."""
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
