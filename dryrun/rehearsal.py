"""Rehearsal of a step under NCCL's rules: what all ranks of a layout launch, and whether they ever wait in a circle.

    rehearsal = Rehearsal.of(config, world=16)
    assert rehearsal.run() == [], "the ranks wait for each other"

One rank of each pipeline rank is recorded by a dry run. The others launch the same on communicators of their own, since
neither shapes nor routing change what is launched. Two steps are recorded: new weights arrive during the second.

A dry run has one stream. On a GPU some waits are of streams beside the computing one, so fewer kernels are held up
there than in a rehearsal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..configs.config import Config
from ..parallel.communicators import Round
from ..parallel.layout import Layout
from ..training.communicators import rounds_of_run
from .machine import rehearse
from .rank import dry_run, layout_of
from .rules import Blocked, Event, Group, Launch, Rules, always_room


@dataclass(frozen=True)
class Rehearsal:
    """Programs of all ranks of a layout."""

    layout: Layout
    programs: Mapping[int, list[Event]]
    groups: Mapping[int, Mapping[str, Group]]
    """Communicators of each rank by name, those that it never uses included."""

    @classmethod
    def of(cls, config: Config, world: int, microbatches: int | None = None) -> Rehearsal:
        """Record one rank of each pipeline rank. Raises UsageError as `dry_run` does."""
        layout = layout_of(config, world)
        rounds = rounds_of_run(config, layout)
        programs: dict[int, list[Event]] = {}
        for pp in range(layout.pp):
            first = layout.rank(pp, 0, 0)
            program = list(dry_run(config, world, first, microbatches, layer=False, steps=2).program)
            for edp in range(layout.edp):
                for ep in range(layout.ep):
                    programs[layout.rank(pp, edp, ep)] = program_at(program, layout, edp, ep)
        caps = config.comm.max_ctas.model_dump()
        return cls(layout, programs, {rank: _groups_of(rank, rounds, caps) for rank in programs})

    def run(self, rules: Rules | None = None) -> list[Blocked]:
        """Run all programs; see `machine.rehearse`."""
        return rehearse(self.programs, self.groups, rules)

    def always_room(self, rules: Rules) -> bool:
        """Whether every rank has room for a kernel of each of its communicators at once."""
        return all(always_room(groups, rules) for groups in self.groups.values())


def program_at(program: list[Event], layout: Layout, edp: int, ep: int) -> list[Event]:
    """The program of the rank with these coordinates, from that of another one on its pipeline rank."""

    def moved(event: Event) -> Event:
        if not isinstance(event, Launch) or event.peer is None:
            return event
        return event._replace(peer=layout.rank(layout.coordinates(event.peer).pp, edp, ep))

    return [moved(event) for event in program]


def _groups_of(rank: int, rounds: list[Round], caps: Mapping[str, int]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for number, each in enumerate(rounds):
        own = each.of(rank)
        name = own.name if own.key is not None else f"{own.name} {number}"
        groups[name] = Group(own.ranks, caps[own.purpose])
    return groups
