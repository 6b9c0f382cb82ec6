"""Costs of a schedule's actions, stage by stage, in any unit of time."""

from __future__ import annotations

from dataclasses import dataclass

from .actions import Action, Overlap


@dataclass(frozen=True)
class Costs:
    """Durations for every stage; transfers between ranks overlap with work and only delay actions that need them."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    hidden: tuple[float, ...]
    """Time that a pair of an F and a B of this stage saves, compared with one after the other: F + I + W - pair.

    A pair of an F and an I is taken to save as much. This is optimistic: without its W it can hide less.
    """
    p2p_latency: float = 0.0
    p2p_bytes: float = 0.0
    p2p_bandwidth: float = float("inf")
    """Bytes per unit of time between two ranks, each direction separately; transfers queue."""

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        forward: float = 1.0,
        backward_input: float = 1.0,
        backward_weight: float = 1.0,
        overlapped: float | None = None,
        p2p: float = 0.0,
    ) -> Costs:
        """The same costs at every stage; a pair takes `overlapped`, by default as long as its parts."""
        parts = forward + backward_input + backward_weight
        hidden = 0.0 if overlapped is None else parts - overlapped
        n = num_stages
        return cls((forward,) * n, (backward_input,) * n, (backward_weight,) * n, (hidden,) * n, p2p_latency=p2p)

    def duration(self, action: Action | Overlap) -> float:
        """Time that a rank is busy with `action`. A pair is never shorter than the longer of its halves."""
        if isinstance(action, Overlap):
            forward, backward = self.duration(action.forward), self.duration(action.backward)
            hidden = (self.hidden[action.forward.stage] + self.hidden[action.backward.stage]) / 2
            return max(forward, backward, forward + backward - hidden)
        stage = action.stage
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "W":
            return self.backward_weight[stage]
        if action.kind == "I":
            return self.backward_input[stage]
        return self.backward_input[stage] + self.backward_weight[stage]
