"""Dispatch in one process with the sums of a two-hop group: the reference for such a group in formats that round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .flat import FlatDispatcher, FlatRoute
from .nodes import Nodes
from .permute import Choice, starts_of
from .routed import DispatchOptions
from .steps.flat_plain import PlainSteps


class OneProcessDispatcher(FlatDispatcher):
    """Dispatcher with all experts in this process. Its sums equal those of `TwoHopDispatcher` bit for bit.

    In combine, and in the backward of dispatch, the partial sums of each rank's and of each node's experts are rounded
    as if they were sent.

    Args:
        num_experts: E.
        nodes: the node of each rank of the two-hop group that is reproduced.
        options: see `DispatchOptions`.
    """

    def __init__(self, num_experts: int, nodes: Sequence[int], options: DispatchOptions | None = None) -> None:
        super().__init__(None, num_experts, options)
        assert num_experts % len(nodes) == 0, f"{num_experts} experts on {len(nodes)} ranks"
        self.node_of_rank = torch.tensor(Nodes.make(nodes).of)

    def begin_route(self, expert_ids: Tensor) -> OneProcessRoute:
        steps = PlainSteps(expert_ids, 1, self.num_experts, self.options.alignment)
        return OneProcessRoute(expert_ids, steps, self)


class OneProcessRoute(FlatRoute):
    """Flat route whose sums are taken by rank, then by node, then by token."""

    def __init__(self, expert_ids: Tensor, steps: PlainSteps, dispatcher: OneProcessDispatcher) -> None:
        super().__init__(steps, dispatcher)
        ranks = dispatcher.node_of_rank.numel()
        self._partial_sums = _partial_sums(
            torch.div(expert_ids, dispatcher.num_experts // ranks, rounding_mode="floor"),
            steps.order.row_of_slot,
            dispatcher.node_of_rank.to(expert_ids.device),
        )

    def sum(self, rows: Tensor) -> Tensor:
        for choice in self._partial_sums:
            rows = choice.sum(rows)
        return rows


def _partial_sums(rank: Tensor, row: Tensor, node_of_rank: Tensor) -> list[Choice]:
    """Sums of each token's rows by rank (in the order of slots), then sums of these by node, then by token.

    rank, row: int64 [T, K], the rank and the row of each slot; the rank is negative for slots that are sent nowhere.
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
