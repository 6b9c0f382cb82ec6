"""The product's meter of messages, kept apart by communicator for a whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist

from ..comm.meter import GroupMeter, Kind, LinkKind, Meter, Tally, Traffic


class Communicator(NamedTuple):
    """Group of ranks that collectives run in."""

    use: str
    """Use that the layout makes it for, such as `ep`."""
    ranks: tuple[int, ...]
    """Global ranks."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Communicator:
        return cls(group.group_desc, tuple(dist.get_process_group_ranks(group)))


class RecordedMeter(Meter):
    """Meter that also keeps what `take` takes, by communicator, and adds each purpose to the list `purposes`."""

    def __init__(self, node_of: Mapping[int, int], purposes: list[str] | None = None) -> None:
        super().__init__(node_of)
        self.purposes = purposes
        self.by_group: dict[str, Traffic] = {}
        """Traffic since the last `restart`, by the names of groups."""
        self.communicators: dict[str, Communicator] = {}

    def restart(self) -> None:
        """Forget the traffic so far."""
        self.by_group.clear()
        self.traffic.clear()

    def group(self, group: dist.ProcessGroup | None) -> GroupMeter:
        name = "" if group is None else group.group_name
        if group is not None and name not in self.communicators:
            self.communicators[name] = Communicator.of(group)
        return replace(super().group(group), meter=_OfGroup(self, name))

    def total(self) -> Traffic:
        """Traffic of all communicators together."""
        total: Traffic = {}
        for traffic in self.by_group.values():
            for kind, tally in traffic.items():
                total.setdefault(kind, Tally()).add(tally.bytes, tally.messages)
        return total


class _OfGroup(Meter):
    """Part of a `RecordedMeter` that counts in one group."""

    def __init__(self, whole: RecordedMeter, name: str) -> None:
        super().__init__(whole.node_of)
        self._whole, self._name = whole, name

    def count(self, purpose: str, collective: str, link: LinkKind, bytes: int, messages: int = 1) -> None:
        self._whole.count(purpose, collective, link, bytes, messages)
        kept = self._whole.by_group.setdefault(self._name, {})
        kept.setdefault(Kind(purpose, collective, link), Tally()).add(bytes, messages)
        if self._whole.purposes is not None:
            self._whole.purposes.append(purpose)
