"""One process that adds up as a group with two hops does: what a group is compared with, in formats that round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .flat import FlatDispatcher, FlatRoute
from .hops import InFlight
from .meter import Meter
from .permute import Choice, starts_of
from .two_hop import Nodes
from .wire import WireFormat


class OneProcessDispatcher(FlatDispatcher):
    """All experts in this process; the sums of combine, and of dispatch's backward, are `TwoHopDispatcher`'s bit for
    bit: partial sums of each rank's and of each node's experts are rounded as if they travelled.

    Args:
        nodes: the node of each rank that the experts would lie on.
    """

    def __init__(
        self,
        num_experts: int,
        nodes: Sequence[int],
        alignment: int = 1,
        wire: WireFormat | None = None,
        meter: Meter | None = None,
        underway: InFlight | None = None,
    ) -> None:
        super().__init__(None, num_experts, alignment, wire, meter, underway)
        assert num_experts % len(nodes) == 0, f"{num_experts} experts on {len(nodes)} ranks"
        self.node_of_rank = torch.tensor(Nodes.make(nodes).of)

    def begin_route(self, expert_ids: Tensor) -> AloneRoute:
        return AloneRoute(expert_ids, self)


class AloneRoute(FlatRoute):
    def __init__(self, expert_ids: Tensor, dispatcher: OneProcessDispatcher) -> None:
        super().__init__(expert_ids, dispatcher)
        ranks = dispatcher.node_of_rank.numel()
        self._sums_in_turn = _partial_sums(
            torch.div(expert_ids, dispatcher.num_experts // ranks, rounding_mode="floor"),
            self._order.row_of_slot,
            dispatcher.node_of_rank.to(expert_ids.device),
        )

    def _sum(self, rows: Tensor) -> Tensor:
        for choice in self._sums_in_turn:
            rows = choice.sum(rows)
        return rows


def _partial_sums(rank: Tensor, row: Tensor, node_of_rank: Tensor) -> list[Choice]:
    """Sums of each rank's rows of a token by slot, of these by node, of those by token.

    rank, row: int64 [T, K], those of each slot; the rank is negative for slots that are sent nowhere.
    """
    tokens, ranks = rank.shape[0], node_of_rank.numel()
    token = torch.arange(tokens, device=rank.device)[:, None].expand_as(rank)
    sent = rank >= 0
    keys, order = (token * ranks + rank)[sent].sort(stable=True)
    pairs, sizes = keys.unique_consecutive(return_counts=True)  # (token, rank)
    by_rank = Choice(row[sent].index_select(0, order), starts_of(sizes))
    nodes = torch.div(pairs, ranks, rounding_mode="floor") * ranks + node_of_rank[pairs % ranks]
    pairs, sizes = nodes.unique_consecutive(return_counts=True)  # (token, node)
    by_node = Choice(torch.arange(nodes.numel(), device=rank.device), starts_of(sizes))
    sizes = torch.bincount(torch.div(pairs, ranks, rounding_mode="floor"), minlength=tokens)
    return [by_rank, by_node, Choice(torch.arange(pairs.numel(), device=rank.device), starts_of(sizes))]
