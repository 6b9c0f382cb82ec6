"""Weight gradients that the backwards of a schedule left over, put into the gaps where a rank would wait."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import replace
from math import inf

from .actions import Action, Overlap, Schedule, parts
from .costs import Costs
from .transfers import Transfer, plan_transfers

# Equal F, I and W and a pair that hides a sixth, as in the figures. The order must suit other costs too, so it does not
# depend on the user's costs: a rank's order stays the same when costs are measured again.
NOMINAL = {"forward": 1.0, "backward_input": 1.0, "backward_weight": 1.0, "overlapped": 2.5}


def place_weight_gradients(schedule: Schedule, live_limit: int, max_wait: float) -> Schedule:
    """Insert a W for every I into `schedule`, which has none; the order of all other actions stays.

    The schedule is simulated at nominal costs. A rank whose next action still lacks an input runs its oldest W,
    unless the input is on its way and arrives within `max_wait` (in units of one F). At most `live_limit` (stage,
    micro-batch) are live on a rank wherever an earlier W can achieve it. O(n log P) for n actions on P ranks.
    """
    play = _Play(schedule, live_limit, max_wait)
    play.run()
    return replace(schedule, actions=tuple(map(tuple, play.done)))


class _Play:
    def __init__(self, schedule: Schedule, live_limit: int, max_wait: float) -> None:
        ranks = range(schedule.num_ranks)
        self.order, self.live_limit, self.max_wait = schedule.actions, live_limit, max_wait
        self.costs = Costs.uniform(schedule.num_stages, **NOMINAL)
        self.boundaries = plan_transfers(schedule)
        self.next = [0] * schedule.num_ranks
        self.done: list[list[Action | Overlap]] = [[] for _ in ranks]
        self.running: list[Action | Overlap | None] = [None for _ in ranks]
        self.left: list[deque[Action]] = [deque() for _ in ranks]
        self.live = [0] * schedule.num_ranks
        self.arrivals: dict[Transfer, float] = {}
        self.ends: list[tuple[float, int]] = []

    def run(self) -> None:
        awake, now = set(range(len(self.order))), 0.0
        while True:
            for rank in sorted(awake):
                if self.running[rank] is None:
                    self._begin(rank, now)
            if not self.ends:
                break
            # Actions that end at the same time all end before any begins, so that every rank decides on the same state.
            now, awake = self.ends[0][0], set()
            while self.ends and self.ends[0][0] == now:
                awake |= self._end(heapq.heappop(self.ends)[1])
        stuck = [rank for rank, actions in enumerate(self.order) if self.next[rank] < len(actions)]
        assert not stuck, f"ranks {stuck} wait for each other"

    def _begin(self, rank: int, now: float) -> None:
        action = self._choose(rank, now)
        if action is None:
            return
        end = now + self.costs.duration(action)
        if action[0] != "W":
            self.next[rank] += 1
            self.arrivals.update(dict.fromkeys(self.boundaries[rank][self.next[rank]].sends, end))
        self.live[rank] += _begins_forward(action)
        self.running[rank] = action
        self.done[rank].append(action)
        heapq.heappush(self.ends, (end, rank))

    def _choose(self, rank: int, now: float) -> Action | Overlap | None:
        left = self.left[rank]
        if self.next[rank] < len(self.order[rank]):
            action = self.order[rank][self.next[rank]]
            if not (left and self.live[rank] >= self.live_limit and _begins_forward(action)):
                needs = self.boundaries[rank][self.next[rank]].needs
                ready_at = max((self.arrivals.get(transfer, inf) for transfer in needs), default=now)
                if ready_at <= now:
                    return action
                if ready_at <= now + self.max_wait:
                    return None
        return left.popleft() if left else None

    def _end(self, rank: int) -> set[int]:
        """Finish the action that runs on `rank`; returns the ranks that may now continue."""
        action, self.running[rank] = self.running[rank], None
        assert action is not None
        for part in parts(action):
            if part.kind == "I":
                self.left[rank].append(part._replace(kind="W"))
            self.live[rank] -= part.kind in ("B", "W")
        sends = () if action[0] == "W" else self.boundaries[rank][self.next[rank]].sends
        return {rank, *(transfer.target for transfer in sends)}


def _begins_forward(action: Action | Overlap) -> bool:
    return isinstance(action, Overlap) or action.kind == "F"
