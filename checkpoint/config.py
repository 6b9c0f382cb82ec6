"""The `checkpoint` section."""

from __future__ import annotations

from ..settings import Section, key


class CheckpointConfig(Section):
    """Frequency and number of checkpoints."""

    every: int = key(1000, "steps between checkpoints; the last step always writes one", unit="steps", ge=1)
    keep: int = key(2, "newest checkpoints kept; 0 keeps all", ge=0)
