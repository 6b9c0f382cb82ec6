"""Balance of the load over the ranks of an expert parallel group: measured loads, new placements, moves of experts.

Experts move between two steps, every `parallel.expert_placement.every` steps. All ranks have the same loads, so all
compute the same placement without communication. L MoE layers (MTP modules last), E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.expert_loads import LOADS, PLACEMENT
from ..configs.config import Config
from ..parallel.experts.moves import move_experts
from ..parallel.experts.placement import (
    Placement,
    contiguous,
    imbalance,
    loads_of_ranks,
    nodes_of_a_group,
    place_experts,
    place_replicas,
    places_of,
)
from ..parallel.groups import Groups
from ..parallel.optimizer.sharded import ShardedOptimizer
from ..report.text.numbers import count, format_bytes
from .build import Model
from .expert_replicas import replicated

logger = logging.getLogger(__name__)


class ExpertBalance:
    """Placement of the experts of a run, and the loads that decide the next placement."""

    def __init__(
        self, config: Config, groups: Groups, model: Model, optimizer: ShardedOptimizer, device: torch.device
    ) -> None:
        placing, architecture = config.parallel.expert_placement, config.model
        layers, experts = architecture.num_moe_layers, architecture.n_routed_experts
        self._groups, self._model, self._optimizer = groups, model, optimizer
        self._num_groups = architecture.n_group if architecture.limits_groups else 1
        self._num_nodes = nodes_of_a_group(groups.layout)
        self._every = placing.every if groups.layout.ep > 1 and layers else None
        self._gain, self._replicas = placing.gain, placing.evaluation_replicas
        self._window = placing.every or config.checkpoint.every  # steps that loads are summed over
        self._loads = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._steps = 0
        self.placements: list[Placement] = [contiguous(experts)] * layers
        """Expert at each place, per layer."""

    @property
    def rank_of_expert(self) -> Tensor:
        """`[L, E]` int64 on the CPU: the rank, in its expert parallel group, that holds each expert."""
        each = self._loads.shape[1] // self._groups.layout.ep
        places = torch.tensor([places_of(placement) for placement in self.placements], dtype=torch.int64)
        return torch.div(places.view(self._loads.shape), each, rounding_mode="floor")

    def measure(self, counts: Tensor, step: int) -> None:
        """Add the tokens `[L, E]` that all ranks sent to each expert in step `step`."""
        if (step - 1) % self._window == 0:
            self._loads.zero_()
            self._steps = 0
        self._loads += counts
        self._steps += 1

    def rebalance(self, step: int) -> None:
        """Move experts before the gradients of the step after `step`, if a move is due and helps.

        A move at the end of `step` would be too early: a checkpoint of `step` holds the placement of its gradients.
        """
        if self._every is None or not step or step % self._every:
            return
        loads = self._loads.tolist()
        ranks = self._groups.layout.ep
        after = [
            place_experts(layer, present, self._num_groups, self._num_nodes, ranks, self._gain)
            for layer, present in zip(loads, self.placements, strict=True)
        ]
        moved = sum(map(_moves, self.placements, after))
        was, now = (_over_the_mean(loads, placements, ranks) for placements in (self.placements, after))
        sent = self._apply(after, move=True)
        logger.info(
            "experts: %d of %d moved, %s; busiest rank %.2f -> %.2f x the mean, worst layer %.2f -> %.2f",
            moved,
            self._loads.numel(),
            format_bytes(sent),
            fmean(was),
            fmean(now),
            max(was),
            max(now),
        )

    @contextmanager
    def for_evaluation(self) -> Iterator[None]:
        """Give experts the replicas of `evaluation_replicas`, by the loads measured so far, inside the context."""
        if self._replicas is None:
            yield
            return
        ranks = self._groups.layout.ep
        loads = self._loads.tolist()
        with ExitStack() as stack:
            for number, layer in self._model.mixtures():
                placed = place_replicas(loads[number], self._replicas, self._num_groups, self._num_nodes, ranks)
                present = self.placements[number]
                physical = placed.physical_to_logical
                stack.enter_context(replicated(layer, present, physical, self._groups, self._model.dispatcher))
            yield

    def record(self) -> dict[str, Any]:
        """Loads and placement, for a checkpoint's progress record."""
        loads = {"steps": self._steps, "tokens": self._loads.tolist()}
        if all(placement == contiguous(len(placement)) for placement in self.placements):
            return {LOADS: loads}
        placement = {
            "ranks": self._groups.layout.ep,
            "nodes": self._num_nodes,
            "experts": [list(placement) for placement in self.placements],
        }
        return {LOADS: loads, PLACEMENT: placement}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's progress record. Call this before its tensors are read: it sets experts' names.

        A placement is for one number of ranks and nodes: in another layout experts are in their order again.
        """
        loads = progress.get(LOADS, {"steps": 0, "tokens": self._loads.new_zeros(self._loads.shape).tolist()})
        self._steps = loads["steps"]
        self._loads.copy_(torch.tensor(loads["tokens"], dtype=torch.int64).view(self._loads.shape))
        written = progress.get(PLACEMENT)
        placements = [contiguous(self._loads.shape[1])] * len(self.placements)
        if written is not None:
            here = self._groups.layout.ep, self._num_nodes
            if (written["ranks"], written["nodes"]) == here:
                placements = [tuple(placement) for placement in written["experts"]]
            else:
                logger.info(
                    "experts begin in their order: the checkpoint has them placed for ep %d on %s, this run has ep %d "
                    "on %s",
                    written["ranks"],
                    count(written["nodes"], "node"),
                    here[0],
                    count(here[1], "node"),
                )
        self._apply(placements, move=False)

    def _apply(self, placements: list[Placement], move: bool) -> int:
        """Apply `placements`, with weights and optimizer state if `move`; return the bytes that all ranks sent."""
        group, sent = self._groups.ep, 0
        for number, layer in self._model.mixtures():
            before, after = self.placements[number], placements[number]
            if before == after:
                continue
            if move:
                weights = list(layer.experts.parameters())
                sent += move_experts(self._optimizer, weights, before, after, group, self._groups.meter)
            layer.hold(after, group.rank(), group.size())
        changed = placements != self.placements  # equal on all ranks, whatever layers they hold
        self.placements = placements
        if not changed:
            return 0
        for item in self._model.placed():
            self._optimizer.rename(item.parameter, item.names)
        if not move:
            return 0
        self._optimizer.publish()
        total = torch.tensor(sent, device=self._loads.device)
        self._groups.sum(total)
        return int(total)


def _over_the_mean(loads: list[list[int]], placements: list[Placement], ranks: int) -> list[float]:
    """Load of the busiest rank over the mean, per layer."""
    return [imbalance(loads_of_ranks(layer, at, ranks)) for layer, at in zip(loads, placements, strict=True)]


def _moves(before: Placement, after: Placement) -> int:
    return sum(old != new for old, new in zip(before, after, strict=True))
