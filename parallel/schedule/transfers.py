"""Transfers between the ranks of a schedule, derived from its actions: no schedule lists them by hand.

A rank with n actions has n + 1 boundaries; boundary i lies before action i, the last one after all of them. At a
boundary a rank posts its receives and its sends together, and then waits for the inputs of the coming action. The
checker, the simulator and the executor all read this one plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .actions import Action, Overlap, Schedule, parts


class Transfer(NamedTuple):
    """A tensor on its way between two pipeline ranks, which always differ.

    An activation is the output of a forward and goes to the next stage; a gradient is the output of a
    backward and goes to the stage before.
    """

    kind: Literal["activation", "gradient"]
    stage: int
    """The stage that produced the tensor."""
    microbatch: int
    source: int
    target: int

    @property
    def tensor(self) -> str:
        """The tensor in words."""
        return f"{self.kind} of micro-batch {self.microbatch} that stage {self.stage} made"

    def __str__(self) -> str:
        return f"{self.tensor}, from rank {self.source} to rank {self.target}"


class Boundary(NamedTuple):
    """Transfers of a rank between two actions."""

    sends: tuple[Transfer, ...]
    """Outputs of the action before for other ranks; a pair's forward comes first."""
    receives: tuple[Transfer, ...]
    """Transfers that the rank begins to receive here, one action before their use, so that they run during it.

    A W does not count as that action. No rank waits for a W, and the senders would wait until it ends.

    Messages of one (source, target) channel are matched by their order alone, as in NCCL. Messages are therefore
    received in the order in which the source sends them, and a message that is needed late is posted early if one
    behind it is needed early.
    """
    needs: tuple[Transfer, ...]
    """Transfers that must have arrived before the coming action runs."""


def plan_transfers(schedule: Schedule) -> tuple[tuple[Boundary, ...], ...]:
    """Boundaries of each rank of a complete schedule (`check`), one more than it has actions. Linear in the actions."""
    dataflow = Dataflow(schedule)
    posted_at = post_receives(schedule, dataflow)
    made: dict[int, Transfer] = {}
    sends: list[list[tuple[Transfer, ...]]] = [[()] for _ in schedule.actions]
    receives: list[dict[int, list[Transfer]]] = [{} for _ in schedule.actions]
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            sent = []
            for part in parts(action):
                transfer = dataflow.transfer_of(part, rank)
                if transfer is not None:
                    output = dataflow.number(part)
                    made[output] = transfer
                    receives[transfer.target].setdefault(posted_at[output], []).append(transfer)
                    sent.append(transfer)
            sends[rank].append(tuple(sent))

    plan = []
    for rank, actions in enumerate(schedule.actions):
        boundaries = []
        for position, action in enumerate(actions):
            inputs = (made.get(dataflow.input_of(part)) for part in parts(action))
            needs = tuple(transfer for transfer in inputs if transfer is not None)
            boundaries.append(Boundary(sends[rank][position], tuple(receives[rank].get(position, ())), needs))
        boundaries.append(Boundary(sends[rank][-1], (), ()))
        plan.append(tuple(boundaries))
    return tuple(plan)


class Dataflow:
    """Producers and consumers in a schedule: where each forward and backward runs, and which action needs its output.

    Actions are numbered: the forwards by stage and micro-batch, then likewise the backwards (B or I).
    `ranks` and `positions` hold by number where each runs, -1 for a missing one.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.num_microbatches, self.last_stage = schedule.num_microbatches, schedule.num_stages - 1
        self.half = schedule.num_stages * schedule.num_microbatches
        self.ranks, self.positions = [-1] * (2 * self.half), [-1] * (2 * self.half)
        for rank, position, part in schedule.work():
            if part.kind != "W":
                number = self.number(part)
                self.ranks[number], self.positions[number] = rank, position

    def number(self, part: Action) -> int:
        """The number of a forward or backward; its output has the same."""
        index = part.stage * self.num_microbatches + part.microbatch
        return index if part.kind == "F" else index + self.half

    def input_of(self, part: Action) -> int:
        """The output that `part` needs from another stage, -1 if it needs none."""
        kind, stage, _ = part
        if kind == "W" or stage == (0 if kind == "F" else self.last_stage):
            return -1
        return self.number(part) + (-self.num_microbatches if kind == "F" else self.num_microbatches)

    def consumer_of(self, part: Action) -> int:
        """The forward or backward of another stage that needs the output of `part`, -1 if none does."""
        kind, stage, _ = part
        if kind == "W" or stage == (self.last_stage if kind == "F" else 0):
            return -1
        return self.number(part) + (self.num_microbatches if kind == "F" else -self.num_microbatches)

    def target_of(self, part: Action) -> int | None:
        """The rank that needs the output of `part`, which may be its own rank; None if no rank needs it."""
        consumer = self.consumer_of(part)
        if consumer < 0:
            return None
        assert self.ranks[consumer] >= 0, f"the successor of {part} at the next stage is missing: check the schedule"
        return self.ranks[consumer]

    def transfer_of(self, part: Action, rank: int) -> Transfer | None:
        """The transfer of the output of `part` from `rank`, where it runs; None if the output stays there."""
        target = self.target_of(part)
        if target is None or target == rank:
            return None
        return Transfer("activation" if part.kind == "F" else "gradient", part.stage, part.microbatch, rank, target)


def post_receives(schedule: Schedule, dataflow: Dataflow) -> list[int]:
    """Boundary at which the target begins to receive each output; -1 for outputs that stay on their rank."""
    # By channel, in the order of its source: the outputs and the positions where they are needed.
    channels: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, _, part in schedule.work():
        target = dataflow.target_of(part)
        if target is not None and target != rank:
            needed_at = dataflow.positions[dataflow.consumer_of(part)]
            channels.setdefault((rank, target), []).append((dataflow.number(part), needed_at))

    posted_at = [-1] * len(dataflow.ranks)
    ahead = [_one_ahead(actions) for actions in schedule.actions]
    for (_, target), outputs in channels.items():
        boundary = len(ahead[target])
        # From the last to the first: no receive may be posted after a later one of its channel.
        for output, needed_at in reversed(outputs):
            boundary = posted_at[output] = min(boundary, ahead[target][needed_at])
    return posted_at


def _one_ahead(actions: Sequence[Action | Overlap]) -> list[int]:
    """Boundary at which the inputs of each action are posted: before the last earlier action that is not a W."""
    boundaries = [0]
    for position, action in enumerate(actions):
        boundaries.append(boundaries[-1] if action[0] == "W" else position)
    return boundaries[:-1]


def links(schedule: Schedule) -> set[tuple[int, int]]:
    """Pairs of ranks, lower first, that send to each other. Linear in the number of actions.

    The forwards decide: a backward runs where its forward ran, so gradients take the links of activations.
    """
    ranks = {(part.stage, part.microbatch): rank for rank, _, part in schedule.work() if part.kind == "F"}
    pairs = ((rank, ranks.get((stage + 1, microbatch), rank)) for (stage, microbatch), rank in ranks.items())
    return {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
