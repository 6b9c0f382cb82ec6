"""Times of a schedule's actions, simulated or measured: spans, bubbles, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .actions import Action, Overlap, Schedule


class Span(NamedTuple):
    """An action of a rank from `start` to `end`, counted from the start of the step, in the unit of the costs."""

    action: Action | Overlap
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of `schedule` with the times of its actions."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """Spans of each rank, in order."""
    peak_microbatches: tuple[int, ...]
    """Largest number of (stage, micro-batch) whose activations each rank holds at once, from F to W."""

    @property
    def step_time(self) -> float:
        """Time from the start of the first action to the end of the last, over all ranks."""
        return max((spans[-1].end for spans in self.spans if spans), default=0.0)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Time of the step in which each rank runs no action."""
        return tuple(self.step_time - sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_fraction(self) -> float:
        """Share of all ranks' time that is bubble."""
        whole = self.step_time * len(self.spans)
        return sum(self.bubble) / whole if whole else 0.0

    @property
    def parameter_copies(self) -> float:
        """Mean number of ranks that hold a stage: 2 for a bidirectional pipeline, otherwise 1."""
        return sum(map(len, self.schedule.stages_of_rank)) / self.schedule.num_stages

    def to_json(self) -> dict[str, Any]:
        """The numbers that `counterflow simulate --json` prints."""
        return {
            "step_time": self.step_time,
            "bubble": list(self.bubble),
            "bubble_fraction": self.bubble_fraction,
            "peak_microbatches": list(self.peak_microbatches),
            "parameter_copies": self.parameter_copies,
        }
