"""Simulation of a schedule with given costs: when each action runs, and where a rank waits."""

from __future__ import annotations

from ...settings import UsageError
from .actions import Action, Overlap, Schedule, parts
from .check import check, peak_live
from .costs import Costs
from .timeline import Span, Timeline
from .transfers import Dataflow


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Start every action as soon as its rank is free and its inputs have arrived; linear in the number of actions.

    A transfer leaves when the action that produced it ends. It occupies its directed channel for
    p2p_bytes / p2p_bandwidth, in turn, arrives p2p_latency later, and occupies no rank.

    Raises UsageError if costs and schedule differ in their number of stages, ScheduleError if it cannot run.
    """
    for name in ("forward", "backward_input", "backward_weight", "hidden"):
        count = len(getattr(costs, name))
        if count != schedule.num_stages:
            raise UsageError(
                f"costs.{name} has {count} stages, but schedule {schedule.name} for {schedule.num_ranks} ranks has "
                f"{schedule.num_stages}: give one cost per stage"
            )
    return _Simulation(schedule, costs).run()


class _Simulation:
    """A worklist of ranks: each runs until the arrival of an input is unknown; the input's producer wakes it."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.dataflow = Dataflow(schedule)
        self.spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
        # By `Dataflow.number`: the time at which an output reaches its consumer, and the rank that waits for it.
        self.arrivals: list[float | None] = [None] * len(self.dataflow.ranks)
        self.waiting: dict[int, int] = {}
        self.channel_free_at: dict[tuple[int, int], float] = {}
        self.durations: dict[tuple[object, ...], float] = {}

    def run(self) -> Timeline:
        awake = list(range(self.schedule.num_ranks))
        while awake:
            self._run_rank(awake.pop(), awake)
        if self.waiting:
            check(self.schedule, training=any(part.kind != "F" for _, _, part in self.schedule.work()))
            raise AssertionError("the checker passed a schedule in which ranks wait for each other")
        peaks = tuple(peak_live(actions) for actions in self.schedule.actions)
        return Timeline(self.schedule, tuple(map(tuple, self.spans)), peaks)

    def _run_rank(self, rank: int, awake: list[int]) -> None:
        spans, actions = self.spans[rank], self.schedule.actions[rank]
        now = spans[-1].end if spans else 0.0
        for position in range(len(spans), len(actions)):
            action = actions[position]
            start = now
            for part in parts(action):
                needed = self.dataflow.input_of(part)
                if needed >= 0:
                    arrival = self.arrivals[needed]
                    if arrival is None:
                        self.waiting[needed] = rank
                        return
                    if arrival > start:
                        start = arrival
            now = start + self._duration(action)
            spans.append(Span(action, start, now))
            for part in parts(action):
                self._deliver(rank, part, now, awake)

    def _duration(self, action: Action | Overlap) -> float:
        """Duration of `action`. Costs depend on kind and stage alone, so few are computed."""
        if isinstance(action, Overlap):
            key: tuple[object, ...] = (action.forward.stage, action.backward.kind, action.backward.stage)
        else:
            key = action[:2]
        duration = self.durations.get(key)
        if duration is None:
            duration = self.durations[key] = self.costs.duration(action)
        return duration

    def _deliver(self, rank: int, part: Action, now: float, awake: list[int]) -> None:
        """Deliver the output of `part` to the rank that needs it, which may be this one."""
        target = self.dataflow.target_of(part)
        if target is None:
            return
        if target != rank:
            channel = rank, target
            sent = max(now, self.channel_free_at.get(channel, 0.0)) + self.costs.p2p_bytes / self.costs.p2p_bandwidth
            self.channel_free_at[channel] = sent
            now = sent + self.costs.p2p_latency
        output = self.dataflow.number(part)
        self.arrivals[output] = now
        waiting = self.waiting.pop(output, None)
        if waiting is not None:
            awake.append(waiting)
