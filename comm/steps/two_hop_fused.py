"""Work of a two-hop route by fused kernels, on GPUs: the values of `two_hop_plain.py`, one launch for each method.

Tokens keep the order of arrival, and positions of rows take the place of sorted indices. A sum reads each of its rows
once, and a copy is written to all its places at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routes.index import Arrivals, count_tokens, number_copies
from ...kernels.routes.rows import spread_messages, spread_rows, sum_copies
from ..message import MessageLayout
from ..nodes import NodeMap
from .expansion_fused import FusedExpansion
from .two_hop_plain import Blocks, Parts


class FusedSteps:
    """Indices of one route, and the moves and sums of rows along it; arguments and methods are those of `PlainSteps`.

    `counts` and `into` lie in one piece of memory with the tokens for each node, so that the host reads what it needs
    in one copy.
    """

    def __init__(self, expert_ids: Tensor, places: NodeMap, alignment: int) -> None:
        self._expert_ids, self._places, self._alignment = expert_ids, places, alignment
        tables, device = _Tables(places), expert_ids.device
        sent, received = sum(places.counts_sent), places.counts_received * len(places.nodes.of)
        self._numbers = count_tokens(
            expert_ids,
            places.table("ranges", device, tables.ranges),
            places.table("starts", device, tables.starts),
            places.table("targets", device, tables.targets),
            sent + received + places.nodes.count,
        )
        self.counts, self.into = self._numbers[:sent], self._numbers[sent : sent + received]
        self._numbers = self._numbers[sent:]
        self.tokens_per_expert: list[int] = []

    def prepare(self) -> None:
        bounds = self._places.table("bounds of nodes", self._expert_ids.device, _Tables(self._places).of_nodes)
        self._source = number_copies(self._expert_ids, bounds)

    def numbers(self, received: Tensor) -> Tensor:
        return self._numbers

    def complete(self, received: Tensor, rows_per_expert: list[int], copies: tuple[int, int], blocks: Blocks) -> None:
        self._received, self._rows_per_expert, self._copies = received, rows_per_expert, copies

    def join(self, payload: Tensor, weights: Tensor, layout: MessageLayout) -> Parts:
        return _by_rows(payload), weights

    def messages(self, parts: Parts, layout: MessageLayout) -> Tensor:
        return spread_messages(*parts, self._expert_ids, self._source, self._copies[0], layout.id_type)

    def relay(self, relayed: Tensor, layout: MessageLayout) -> Tensor:
        bounds = self._places.table("bounds of members", relayed.device, _Tables(self._places).of_members)
        self._relay = number_copies(_part(relayed, layout, 3), bounds)
        return spread_rows(relayed, self._relay, self._copies[1])

    def expand(self, arrived: Tensor, layout: MessageLayout) -> tuple[Tensor, Tensor]:
        places, own = self._places, self._places.per_rank + self._places.rank - self._places.members.start
        turns = places.table("turns", arrived.device, _Tables(places).turns)
        arrivals = Arrivals(
            _part(arrived, layout, 3),
            _part(arrived, layout, 2),
            self._received[:, : places.per_rank],
            self._received[:, own],
            turns,
        )
        first = places.rank * places.per_rank
        self._expansion = FusedExpansion(arrivals, self._rows_per_expert, first, self._alignment)
        self.tokens_per_expert, self.offsets = self._expansion.tokens_per_expert, self._expansion.offsets
        return self._expansion.rows(layout.payload(arrived)), self._expansion.row_weights

    def from_source(self, rows: Tensor) -> Tensor:
        return spread_rows(_by_rows(rows), self._source, self._copies[0])

    def from_relay(self, rows: Tensor) -> Tensor:
        return spread_rows(rows, self._relay, self._copies[1])

    def to_experts(self, rows: Tensor) -> Tensor:
        return self._expansion.rows(rows)

    def sum_here(self, rows: Tensor) -> Tensor:
        return self._expansion.sum(rows)

    def slots(self, weights: Tensor) -> Tensor:
        return self._expansion.slots(weights)

    def sum_at_relay(self, rows: Tensor) -> Tensor:
        return sum_copies(rows, self._relay)

    def sum_at_source(self, rows: Tensor) -> Tensor:
        return sum_copies(rows, self._source)


class _Tables:
    """Tables that stay the same for all routes of a rank, int32."""

    def __init__(self, places: NodeMap) -> None:
        self._places = places

    def of_nodes(self) -> Tensor:
        """First expert of each node, and the end: [N + 1]."""
        nodes, per_rank = self._places.nodes, self._places.per_rank
        return _int32(
            [per_rank * nodes.members(node).start for node in range(nodes.count)] + [per_rank * len(nodes.of)]
        )

    def of_members(self) -> Tensor:
        """First expert of each rank of this node, and the end."""
        members = self._places.members
        return _int32([self._places.per_rank * rank for rank in range(members.start, members.stop + 1)])

    def turns(self) -> Tensor:
        """Place of each rank's tokens in the order of arrival: [G]."""
        turn = {source: place for place, source in enumerate(self._places.arrival)}
        return _int32([turn[source] for source in range(len(turn))])

    def ranges(self) -> Tensor:
        """First expert and end of every range of experts whose tokens are counted: [U, 2]."""
        return _int32(list(self._counted()))

    def starts(self) -> Tensor:
        """Starts of each range's places in `targets`, and the end: [U + 1]."""
        return _int32([0, *map(len, self._counted().values())]).cumsum(0, dtype=torch.int32)

    def targets(self) -> Tensor:
        """Places of every range's count: in the counts sent to each rank, and behind all that is received."""
        return _int32([place for places in self._counted().values() for place in places])

    def _counted(self) -> dict[tuple[int, int], list[int]]:
        """Places of the count of each range of experts."""
        places, per_rank = self._places, self._places.per_rank
        counted: dict[tuple[int, int], list[int]] = {}
        place = 0

        def count(first: int, end: int) -> None:
            nonlocal place
            counted.setdefault((first, end), []).append(place)
            place += 1

        for node in range(places.nodes.count):
            members = places.nodes.members(node)
            for rank in members:
                for expert in range(per_rank * rank, per_rank * (rank + 1)):
                    count(expert, expert + 1)
                for member in members:
                    count(per_rank * member, per_rank * (member + 1))
                count(per_rank * members.start, per_rank * members.stop)
        place += places.counts_received * len(places.nodes.of)
        for node in range(places.nodes.count):
            members = places.nodes.members(node)
            count(per_rank * members.start, per_rank * members.stop)
        return counted


def _int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _by_rows(rows: Tensor) -> Tensor:
    """The rows, with the values of a row side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _part(messages: Tensor, layout: MessageLayout, number: int) -> Tensor:
    """View of the weights (2) or the ids (3) in messages that begin at multiples of 16 bytes."""
    ends = layout.ends
    return messages[:, ends[number - 1] : ends[number]].view(torch.float32 if number == 2 else layout.id_type)
