"""Schedules and costs for hypothesis to draw, and a second, slower computation of a schedule's times."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule, parts
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.costs import Costs

# Every shipped schedule with every option it has.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpipe", {}),
    ("1f1b", {}),
    ("interleaved", {}),
    ("interleaved", {"stages_per_rank": 1}),
    ("interleaved", {"stages_per_rank": 3}),
    ("zb1p", {}),
    ("dualpipe", {}),
    ("dualpipe", {"defer_weights": True}),
    ("dualpipev", {}),
    ("dualpipev", {"defer_weights": True}),
]


def examples(count: int) -> settings:
    """Settings of a test with this number of examples, without a deadline."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def schedules(draw: st.DrawFn, ranks: int = 16, microbatches: int = 64) -> Schedule:
    name, options = draw(st.sampled_from(VARIANTS))
    num_ranks = draw(st.integers(1, ranks))
    if name == "dualpipe":
        num_ranks += num_ranks % 2
    return find_schedule(name)(num_ranks, draw(st.integers(1, microbatches)), **options)


@st.composite
def costs(draw: st.DrawFn, num_stages: int) -> Costs:
    """Draw costs for each stage, in whole numbers so that sums are exact; a pair may be cheaper than its parts."""

    def each(low: int, high: int) -> tuple[float, ...]:
        return tuple(map(float, draw(st.lists(st.integers(low, high), min_size=num_stages, max_size=num_stages))))

    forward, backward_input, backward_weight = each(1, 20), each(1, 20), each(1, 20)
    hidden = tuple(float(draw(st.integers(0, int(cost)))) for cost in forward)
    latency, size = draw(st.sampled_from([(0.0, 0.0), (3.0, 0.0), (0.0, 8.0), (2.0, 16.0)]))
    return Costs(forward, backward_input, backward_weight, hidden, latency, size, p2p_bandwidth=4.0)


def ends_by_relaxation(schedule: Schedule, costs: Costs) -> dict[tuple[int, int], float]:
    """End of each action (rank, position): the least times that respect all constraints, found by raising them.

    This computation uses neither worklists nor `transfers.py`; it repeats all constraints until nothing changes.
    """
    done_at = {part: (rank, position) for rank, position, part in schedule.work()}
    ends: dict[tuple[int, int], float] = {
        (rank, position): 0.0 for rank, actions in enumerate(schedule.actions) for position in range(len(actions))
    }
    changed = True
    while changed:
        changed = False
        arrivals = _arrivals(schedule, costs, done_at, ends)
        for rank, actions in enumerate(schedule.actions):
            free = 0.0
            for position, action in enumerate(actions):
                start = max([free, *(arrivals.get(part, 0.0) for part in parts(action))])
                free = start + costs.duration(action)
                if free != ends[rank, position]:
                    ends[rank, position], changed = free, True
                assert free < math.inf
    return ends


def _arrivals(
    schedule: Schedule,
    costs: Costs,
    done_at: dict[Action, tuple[int, int]],
    ends: dict[tuple[int, int], float],
) -> dict[Action, float]:
    """Arrival of each action's input from another stage."""
    arrivals = {}
    channels: dict[tuple[int, int], float] = {}
    for rank, position, part in schedule.work():
        step = {"F": 1, "B": -1, "I": -1, "W": 0}[part.kind]
        consumers = [Action(kind, part.stage + step, part.microbatch) for kind in ("F" if step == 1 else "BI")]
        for action in consumers if step else []:
            if action in done_at:
                arrival, target = ends[rank, position], done_at[action][0]
                if target != rank:
                    left = max(arrival, channels.get((rank, target), 0.0)) + costs.p2p_bytes / costs.p2p_bandwidth
                    channels[rank, target] = left
                    arrival = left + costs.p2p_latency
                arrivals[action] = arrival
    return arrivals


def parse_order(text: str) -> tuple[Action | Overlap, ...]:
    """Parse a rank's order in `deepseek_orders.json`: "F0.1 F3.1+B0.0" is F0 of stage 1, and a pair."""
    order: list[Action | Overlap] = []
    for token in text.split():
        read = []
        for part in token.split("+"):
            microbatch, stage = map(int, part[1:].split("."))
            read.append(Action(part[0], stage, microbatch))  # type: ignore[arg-type]
        order.append(Overlap(*read) if len(read) == 2 else read[0])
    return tuple(order)
