"""Experts that tokens are sent to in a dry run, where no router has scores, and the counts of rows that follow.

Every micro-batch and layer sends its tokens alike. G ranks of the expert parallel group, T tokens of a micro-batch,
K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..comm.flat import FlatDispatcher
from ..comm.nodes import Nodes
from ..comm.routed import RoutedDispatcher
from ..comm.two_hop import TwoHopDispatcher
from ..configs.config import Config
from ..model.config import ModelConfig
from ..model.router import Router
from ..parallel.layout import Layout

RoutingName = Literal["even", "skewed", "drawn"]
ROUTINGS: dict[RoutingName, str] = {
    "drawn": "the router's own selection on random scores",
    "even": "every expert gets equally many tokens",
    "skewed": "the same selection, with about twice the tokens for this rank's experts",
}


class TokenRouting:
    """Experts of every token in the expert parallel group of one rank."""

    def __init__(self, name: RoutingName, config: Config, layout: Layout, rank: int, seed: int = 0) -> None:
        assert name in get_args(RoutingName), name
        model, batch = config.model, config.batch
        self.name = name
        self.here = layout.coordinates(rank).ep
        self.experts, self.size = model.n_routed_experts, layout.ep
        self.per_rank = self.experts // self.size
        tokens = batch.micro_sequences * batch.sequence_length
        generator = torch.Generator().manual_seed(seed)
        router = Router(model)
        self.ids: list[Tensor] = []
        """int64 [T, K] for each rank of the group."""
        for source in range(self.size):
            if name == "even":
                self.ids.append(_even(model, tokens, source))
                continue
            scores = torch.rand(tokens, self.experts, generator=generator)
            if name == "skewed":  # scores are uniform in [0, 1], so this about doubles the share of an expert
                more = model.num_experts_per_tok / self.experts
                scores[:, self.here * self.per_rank : (self.here + 1) * self.per_rank] += more
            self.ids.append(router.select(scores))
        self.counts = torch.stack([torch.bincount(ids.flatten(), minlength=self.experts) for ids in self.ids])
        """int64 [G, E], tokens that each rank sends to each expert."""

    @property
    def rows(self) -> int:
        """Rows of this rank's experts."""
        return int(self._to_here().sum())

    def ends(self, alignment: int) -> Tensor:
        """Ends of the rows of this rank's experts, int32 [E / G], as `Dispatched.offsets`."""
        rows = self._to_here().sum(0)
        return (-(-rows // alignment) * alignment).cumsum(0).int()

    @property
    def load(self) -> float:
        """Rows of this rank's experts over the mean of the ranks."""
        return self.rows * self.size / int(self.counts.sum())

    def reader(self, dispatcher: RoutedDispatcher) -> Callable[[Tensor], list[Any]]:
        """Function to take the place of `dispatcher.read_counts`; it waits for the device as that does."""
        if isinstance(dispatcher, FlatDispatcher):
            numbers: list[Any] = self._flat()
        elif isinstance(dispatcher, TwoHopDispatcher):
            numbers = self._two_hop(dispatcher.nodes)
        else:
            raise AssertionError(f"no counts are known for a {type(dispatcher).__name__}")

        def read(counts: Tensor) -> list[Any]:
            waited = counts.cpu()
            assert waited.numel() == len(torch.tensor(numbers).flatten()), (waited.shape, len(numbers))
            return numbers

        return read

    def _to_here(self) -> Tensor:
        """int64 [G, E / G], tokens that each rank sends to this rank's experts."""
        return self.counts[:, self.here * self.per_rank : (self.here + 1) * self.per_rank]

    def _flat(self) -> list[list[int]]:
        """Counts in the order of `FlatRoute.complete`: sent, received, dropped."""
        sent = self.counts[self.here].view(self.size, self.per_rank)
        return [*sent.tolist(), *self._to_here().tolist(), [0] * self.per_rank]

    def _two_hop(self, nodes: Nodes) -> list[int]:
        """Counts in the order of `TwoHopRoute.complete`: by source, rows of the experts here, tokens for each rank of
        this node and tokens for this node; then this rank's tokens for each node."""
        members = nodes.members(nodes.of[self.here])
        numbers: list[int] = []
        for source, ids in enumerate(self.ids):
            wanted = self._wanted(ids // self.per_rank, self.size)[:, members.start : members.stop]
            numbers += self._to_here()[source].tolist()
            numbers += [*wanted.sum(0).tolist(), int(wanted.any(1).sum())]
        node_of = torch.tensor(nodes.of)
        return numbers + self._wanted(node_of[self.ids[self.here] // self.per_rank], nodes.count).sum(0).tolist()

    @staticmethod
    def _wanted(destinations: Tensor, count: int) -> Tensor:
        """Whether a token has each destination, bool [T, count]."""
        return torch.zeros(len(destinations), count, dtype=torch.bool).scatter_(1, destinations, True)


def _even(model: ModelConfig, tokens: int, source: int) -> Tensor:
    """Experts [T, K] by which groups take turns, and the experts of a group too: as even as T allows."""
    groups, reached, chosen = model.n_group, model.topk_group, model.num_experts_per_tok
    if not model.limits_groups:
        groups = reached = 1
    size, slot = model.n_routed_experts // groups, torch.arange(chosen)
    per_group = -(-chosen // reached)
    visit = (torch.arange(tokens).unsqueeze(1) + source * tokens) * reached + slot // per_group
    place = (visit // groups * per_group + slot % per_group) % size
    return visit % groups * size + place
