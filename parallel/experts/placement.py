"""Placement of routed experts on ranks, which evens out measured loads, for training and for inference.

A placement of a layer lists the expert at each place; place p lies on rank p // (places per rank), and ranks of a node
are neighbours. Training holds every expert once (`place_experts`). Inference may hold some of them several times
(`place_replicas`): the greedy hierarchical packing of DeepSeek's EPLB, which V3's serving uses (V3 §3.4).

Pure arithmetic, and the same numbers give the same placement on every machine: ties go to the lower number.
E experts of a layer, P places.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...settings import UsageError, nearest_divisors, nearest_multiples
from ..layout import Layout

Placement = tuple[int, ...]
"""The expert at each place, `[E]`: a permutation of the layer's experts."""


@dataclass(frozen=True)
class Replicated:
    """A layer's placement in which experts may have replicas."""

    physical_to_logical: tuple[int, ...]
    """The expert at each of P places."""
    logical_to_physical: tuple[tuple[int, ...], ...]
    """The places of each of E experts, its replicas in the order in which they were made."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Replicas of each expert, at least 1."""
        return tuple(map(len, self.logical_to_physical))


def contiguous(num_experts: int) -> Placement:
    """The initial placement of training: experts in their order."""
    return tuple(range(num_experts))


def places_of(placement: Sequence[int]) -> tuple[int, ...]:
    """The place of each expert: the inverse of a placement without replicas."""
    places = [0] * len(placement)
    for place, expert in enumerate(placement):
        places[expert] = place
    return tuple(places)


def nodes_of_a_group(layout: Layout) -> int:
    """Number of nodes of each expert parallel group, with equally many ranks on each; 1 if they are uneven."""
    return layout.ep // layout.gpus_per_node if layout.ep % layout.gpus_per_node == 0 else 1


def loads_of_ranks(loads: Sequence[float], placement: Sequence[int], num_ranks: int) -> list[float]:
    """Share of a layer's `loads` `[E]` on each rank; the replicas of an expert share its load evenly."""
    replicas = Counter(placement)
    each = len(placement) // num_ranks
    return [
        sum(loads[expert] / replicas[expert] for expert in placement[first : first + each])
        for first in range(0, len(placement), each)
    ]


def imbalance(loads: Sequence[float]) -> float:
    """Ratio of the largest load to the mean, 1.0 if all loads are equal or zero."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def place_experts(
    loads: Sequence[float], present: Placement, num_groups: int, num_nodes: int, num_ranks: int, gain: float = 0.0
) -> Placement:
    """Place every expert once for training, equally many per rank, with greedy packing to relieve the busiest rank.

    Routing groups are packed onto nodes and stay whole on them, so that a node-limited router stays limited; then each
    node's experts are packed onto its ranks. Where nodes cannot have equally many groups, each group stays within a set
    of num_nodes / gcd(num_groups, num_nodes) neighbouring nodes, as in the contiguous placement: within all nodes where
    the two numbers have no common divisor.

    Args:
        loads: `[E]`, tokens sent to each expert.
        present: the current placement. It stays unless the largest load of a rank falls by more than the share `gain`;
            with gain 0 the result is also never worse than the contiguous placement. Nodes, ranks and places are
            renumbered so that as many experts as a greedy match finds keep their places.
        num_groups: the router's groups, which divide the experts.
        num_nodes: nodes that the ranks of one expert parallel group lie on, equally many on each.
        num_ranks: ranks of that group; they divide the experts.
    """
    experts = len(loads)
    assert len(present) == experts and experts % num_groups == experts % num_ranks == num_ranks % num_nodes == 0
    sets = math.gcd(num_groups, num_nodes)
    packed = _settle(_pack_hierarchically(loads, num_groups, sets, num_ranks), present, sets, num_ranks)

    def busiest(placement: Placement) -> float:
        return max(loads_of_ranks(loads, placement, num_ranks))

    best = min((packed, contiguous(experts)), key=busiest)
    return best if busiest(best) < busiest(present) * (1 - gain) else present


def place_replicas(
    loads: Sequence[float], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Replicated:
    """Place experts for inference: `num_replicas` places, equally many per rank, the busiest experts several times.

    As in EPLB: groups are packed onto nodes; inside a node the expert with the largest load per replica gets one more
    until the places are filled; replicas are packed onto the node's ranks. Where num_nodes does not divide num_groups,
    all nodes count as one.

    Raises UsageError, with the nearest numbers that work, for numbers that do not divide each other.
    """
    _check(loads, num_replicas, num_groups, num_nodes, num_ranks)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    physical: list[int] = []
    replica: list[int] = []
    for experts in _pack_groups(loads, num_groups, num_nodes):
        items, numbers = _replicate([loads[expert] for expert in experts], num_replicas // num_nodes)
        counts = Counter(items)
        shares = [loads[experts[item]] / counts[item] for item in items]
        for pack in _pack(shares, num_ranks // num_nodes):
            physical += [experts[items[index]] for index in pack]
            replica += [numbers[index] for index in pack]
    places: list[dict[int, int]] = [{} for _ in loads]
    for place, (expert, number) in enumerate(zip(physical, replica, strict=True)):
        places[expert][number] = place
    return Replicated(tuple(physical), tuple(tuple(found[i] for i in sorted(found)) for found in places))


def _pack(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Pack equally many items into each pack: the heaviest first, each into the lightest pack that has room."""
    size = len(loads) // num_packs
    if size == 1:  # all ways are equally good
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    with_room = [(0.0, pack) for pack in range(num_packs)]  # a heap
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        load, pack = heapq.heappop(with_room)
        packs[pack].append(item)
        if len(packs[pack]) < size:
            heapq.heappush(with_room, (load + loads[item], pack))
    return packs


def _pack_groups(loads: Sequence[float], num_groups: int, num_sets: int) -> list[list[int]]:
    """The experts of each of `num_sets` sets of nodes, whole groups in the order in which they were packed."""
    size = len(loads) // num_groups
    groups = [range(first, first + size) for first in range(0, len(loads), size)]
    packs = _pack([sum(loads[expert] for expert in group) for group in groups], num_sets)
    return [[expert for group in pack for expert in groups[group]] for pack in packs]


def _replicate(loads: Sequence[float], num_replicas: int) -> tuple[list[int], list[int]]:
    """Item of each replica, and its number among the item's replicas: each item once, then the most loaded again."""
    items, numbers = list(range(len(loads))), [0] * len(loads)
    counts = [1] * len(loads)
    fullest = [(-load, item) for item, load in enumerate(loads)]
    heapq.heapify(fullest)
    while len(items) < num_replicas:
        item = fullest[0][1]
        items.append(item)
        numbers.append(counts[item])
        counts[item] += 1
        heapq.heapreplace(fullest, (-loads[item] / counts[item], item))
    return items, numbers


def _pack_hierarchically(
    loads: Sequence[float], num_groups: int, num_sets: int, num_ranks: int
) -> list[list[list[int]]]:
    """The experts of each rank of each set of nodes."""
    return [
        [[experts[item] for item in pack] for pack in _pack([loads[e] for e in experts], num_ranks // num_sets)]
        for experts in _pack_groups(loads, num_groups, num_sets)
    ]


def _settle(packed: list[list[list[int]]], present: Placement, num_sets: int, num_ranks: int) -> Placement:
    """Placement of the same packs, renumbered so that many experts keep their places."""
    per_rank, per_set = len(present) // num_ranks, len(present) // num_sets
    present_sets = [list(present[first : first + per_set]) for first in range(0, len(present), per_set)]
    packed_sets = [[expert for rank in ranks for expert in rank] for ranks in packed]
    placement: list[int] = []
    for experts, chosen in zip(present_sets, _match(packed_sets, present_sets), strict=True):
        present_ranks = [experts[first : first + per_rank] for first in range(0, per_set, per_rank)]
        ranks = packed[chosen]
        for rank, held in zip(_match(ranks, present_ranks), present_ranks, strict=True):
            singles = [[expert] for expert in ranks[rank]]
            placement += [ranks[rank][item] for item in _match(singles, [[expert] for expert in held])]
    return tuple(placement)


def _match(blocks: list[list[int]], present: list[list[int]]) -> list[int]:
    """Choose for each present block one of `blocks` to take its number; pairs that share most come first."""
    block_of = {expert: number for number, block in enumerate(present) for expert in block}
    shared = Counter((block, block_of[e]) for block, experts in enumerate(blocks) for e in experts if e in block_of)
    taken: dict[int, int] = {}
    left = dict.fromkeys(range(len(blocks)))
    for block, number in sorted(shared, key=lambda pair: (-shared[pair], pair)):
        if block in left and number not in taken:
            taken[number] = block
            del left[block]
    rest = iter(left)
    return [taken[number] if number in taken else next(rest) for number in range(len(present))]


def _check(loads: Sequence[float], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int) -> None:
    experts = len(loads)
    numbers = {"replicas": num_replicas, "groups": num_groups, "nodes": num_nodes, "ranks": num_ranks}
    wrong = [f"{name} {number}: it must be at least 1" for name, number in numbers.items() if number < 1]
    if not wrong:
        if not all(math.isfinite(load) and load >= 0 for load in loads):
            wrong.append("loads must be finite numbers that are not negative")
        if experts % num_groups:
            near = nearest_divisors(num_groups, experts)
            wrong.append(f"groups {num_groups} must divide the {experts} experts (nearest: {near})")
        if num_ranks % num_nodes:
            near = nearest_divisors(num_nodes, num_ranks)
            wrong.append(f"nodes {num_nodes} must divide the {num_ranks} ranks (nearest: {near})")
        if num_replicas < experts or num_replicas % num_ranks:
            near = nearest_multiples(num_replicas, num_ranks, experts)
            wrong.append(
                f"replicas {num_replicas} must be a multiple of {num_ranks} ranks and at least the {experts} experts "
                f"(nearest: {near})"
            )
    if wrong:
        raise UsageError("experts cannot be placed: " + "; ".join(wrong))
