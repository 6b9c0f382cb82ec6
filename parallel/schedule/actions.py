"""Pipeline schedules: for each rank the order of its forwards and backwards, and nothing else.

Words: a stage is one of `num_stages` consecutive slices of the model; a chunk is a stage as held by one rank. F is a
forward, B a whole backward, I the backward for the input alone, W the backward for the weights that an I leaves over.
Sends and receives are not listed: they follow from the actions (`transfers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """A piece of work: `kind` of micro-batch `microbatch` at stage `stage`."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of stage {self.stage}"


class Overlap(NamedTuple):
    """A forward and a backward of different micro-batches, run as a pair in which each hides the other's all-to-all.

    The backward is a B, whose weight gradients end inside the pair, or an I, whose W is a separate action.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"pair of {self.forward} and {self.backward}"


def parts(action: Action | Overlap) -> tuple[Action, ...]:
    """The actions in `action`: both of a pair, otherwise itself."""
    return action if isinstance(action, Overlap) else (action,)


@dataclass(frozen=True)
class Schedule:
    """The work of one training step on every pipeline rank, in order."""

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    stages_of_rank: tuple[tuple[int, ...], ...]
    """Stages that each rank holds. Several ranks may hold a stage, each serving other micro-batches."""
    actions: tuple[tuple[Action | Overlap, ...], ...]
    """Actions of each rank, in order."""

    def holders(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold `stage`, ascending."""
        return tuple(rank for rank, stages in enumerate(self.stages_of_rank) if stage in stages)

    def work(self) -> Iterator[tuple[int, int, Action]]:
        """Yield every action, both of a pair, with its rank and its position in the rank's order."""
        for rank, actions in enumerate(self.actions):
            for position, action in enumerate(actions):
                for part in parts(action):
                    yield rank, position, part


def one_stage_per_rank(
    name: str, num_ranks: int, num_microbatches: int, order: Callable[[int], Iterable[Action]]
) -> Schedule:
    """A schedule in which rank r holds stage r alone and runs `order(r)`."""
    ranks = range(num_ranks)
    stages, actions = tuple((rank,) for rank in ranks), tuple(tuple(order(rank)) for rank in ranks)
    return Schedule(name, num_ranks, num_ranks, num_microbatches, stages, actions)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of `schedule` alone, for an evaluation: each on the same rank.

    The forwards run in waves: a micro-batch moves on by one stage per wave, and the next one follows a stage behind.
    The order of training would not do: it leaves room for backwards, and without backwards ranks may wait for each
    other.
    """
    entered: dict[int, int] = {}
    forwards: list[list[Action]] = [[] for _ in schedule.actions]
    for rank, _, part in schedule.work():
        if part.kind == "F":
            forwards[rank].append(part)
    for actions in forwards:
        entered |= {action.microbatch: turn for turn, action in enumerate(a for a in actions if a.stage == 0)}
    for actions in forwards:
        actions.sort(key=lambda action: (entered[action.microbatch] + action.stage, -action.stage))
    return replace(schedule, actions=tuple(map(tuple, forwards)))
