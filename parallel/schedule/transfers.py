"""What the ranks of a schedule send to each other, derived from its actions: no generator writes it by hand.

A rank with n actions has n + 1 boundaries; boundary i lies before action i, the last one after all of them. At a
boundary a rank posts its receives and its sends together, and then waits for what the coming action needs. The
checker, the simulator and the executor all read this one plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .actions import Action, Overlap, Schedule, parts


class Transfer(NamedTuple):
    """One tensor's way between two pipeline ranks, which always differ.

    An activation is the output of a forward and goes to the next stage; a gradient is that of the input of a backward
    and goes to the stage before.
    """

    kind: Literal["activation", "gradient"]
    stage: int
    """The stage that produced it."""
    microbatch: int
    source: int
    target: int

    def __str__(self) -> str:
        way = f"from rank {self.source} to rank {self.target}"
        return f"{self.kind} of micro-batch {self.microbatch} out of stage {self.stage}, {way}"


class Boundary(NamedTuple):
    """What a rank does between two actions."""

    sends: tuple[Transfer, ...]
    """What the action before produced for other ranks, that of a pair's forward first."""
    receives: tuple[Transfer, ...]
    """What to begin to receive here: one action ahead of its need, so that the transfer runs beside an action.

    A W does not count, as nobody waits for it: its rank would keep others waiting until it is through with its W.

    Messages of one (source, target) channel are matched by their order alone, as in NCCL. So they are received in the
    order in which the source sends them, and one that is needed late is posted early where a later one needs it.
    """
    needs: tuple[Transfer, ...]
    """What must have arrived before the coming action runs."""


def plan_transfers(schedule: Schedule) -> tuple[tuple[Boundary, ...], ...]:
    """For each rank its boundaries, one more than it has actions. Linear in the number of actions.

    Every stage of a micro-batch must have its forward and, where the schedule has any, its backward; `check` says so.
    """
    places = Places(schedule)
    sends: list[list[tuple[Transfer, ...]]] = []
    channels: dict[tuple[int, int], list[Transfer]] = {}
    made: dict[tuple[bool, int], Transfer] = {}
    for rank, actions in enumerate(schedule.actions):
        sends.append([()])
        for action in actions:
            sent = []
            for part in parts(action):
                target = places.target_of(part)
                if target is not None and target != rank:
                    kind: Literal["activation", "gradient"] = "activation" if part.kind == "F" else "gradient"
                    transfer = Transfer(kind, part.stage, part.microbatch, rank, target)
                    made[part.kind == "F", places.index(part)] = transfer
                    channels.setdefault((rank, target), []).append(transfer)
                    sent.append(transfer)
            sends[rank].append(tuple(sent))

    receives = _receives(schedule, places, channels)
    plan = []
    for rank, actions in enumerate(schedule.actions):
        boundaries = []
        for position, action in enumerate(actions):
            inputs = (made.get(source) for source in map(places.input_of, parts(action)) if source is not None)
            needs = tuple(transfer for transfer in inputs if transfer is not None)
            boundaries.append(Boundary(sends[rank][position], tuple(receives[rank].get(position, ())), needs))
        boundaries.append(Boundary(sends[rank][-1], (), ()))
        plan.append(tuple(boundaries))
    return tuple(plan)


class Places:
    """Where each forward and backward of a schedule runs, and so where its input comes from and its output goes.

    Forwards (True) and backwards (False: a B, or the I where it is split) are told apart by a bool, and numbered by
    stage and micro-batch, `count` of each.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.num_microbatches, self.last_stage = schedule.num_microbatches, schedule.num_stages - 1
        self.count = schedule.num_stages * schedule.num_microbatches
        self.ranks: dict[bool, list[int]] = {True: [-1] * self.count, False: [-1] * self.count}
        self.positions: dict[bool, list[int]] = {True: [-1] * self.count, False: [-1] * self.count}
        for rank, position, part in schedule.work():
            if part.kind != "W":
                index = self.index(part)
                self.ranks[part.kind == "F"][index], self.positions[part.kind == "F"][index] = rank, position

    def index(self, part: Action) -> int:
        """The number of its stage and micro-batch."""
        return part.stage * self.num_microbatches + part.microbatch

    def input_of(self, part: Action) -> tuple[bool, int] | None:
        """The forward or backward whose output it needs, if that is of another stage."""
        kind, stage, _ = part
        if kind == "F":
            return (True, self.index(part) - self.num_microbatches) if stage > 0 else None
        if kind == "W" or stage == self.last_stage:
            return None
        return False, self.index(part) + self.num_microbatches

    def target_of(self, part: Action) -> int | None:
        """The rank of the action of another stage that needs its output, if there is one."""
        kind, stage, microbatch = part
        if kind == "W" or stage == (self.last_stage if kind == "F" else 0):
            return None
        there = self.index(part) + (self.num_microbatches if kind == "F" else -self.num_microbatches)
        rank = self.ranks[kind == "F"][there]
        assert rank >= 0, f"{kind}{microbatch} after that of stage {stage} is missing: check the schedule first"
        return rank

    def needed_at(self, transfer: Transfer) -> int:
        """The position of the action on the target that needs it."""
        forward = transfer.kind == "activation"
        stage = transfer.stage + (1 if forward else -1)
        return self.positions[forward][stage * self.num_microbatches + transfer.microbatch]


def _receives(
    schedule: Schedule, places: Places, channels: dict[tuple[int, int], list[Transfer]]
) -> list[dict[int, list[Transfer]]]:
    """For each rank by boundary what it begins to receive there."""
    receives: list[dict[int, list[Transfer]]] = [{} for _ in schedule.actions]
    ahead = [_one_ahead(actions) for actions in schedule.actions]
    for (_, target), transfers in channels.items():
        # From the last to the first: none may be posted after one that follows it.
        boundary = len(ahead[target])
        boundaries = []
        for transfer in reversed(transfers):
            boundary = min(boundary, ahead[target][places.needed_at(transfer)])
            boundaries.append(boundary)
        for transfer, boundary in zip(transfers, reversed(boundaries), strict=True):
            receives[target].setdefault(boundary, []).append(transfer)
    return receives


def _one_ahead(actions: Sequence[Action | Overlap]) -> list[int]:
    """For each action the boundary at which what it needs is posted: before the last one that is not a W."""
    boundaries, before = [], 0
    for position, action in enumerate(actions):
        boundaries.append(before)
        if action[0] != "W":
            before = position
    return boundaries
