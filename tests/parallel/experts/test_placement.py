"""Placements of experts: invariants, and the outputs of DeepSeek's own load balancer."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.experts.placement import (
    Placement,
    contiguous,
    imbalance,
    loads_of_ranks,
    place_experts,
    place_replicas,
    places_of,
)
from counterflow.settings import UsageError

EPLB = json.loads((Path(__file__).parent / "eplb_outputs.json").read_text())["layers"]


@dataclass(frozen=True)
class Case:
    """A layer in training."""

    loads: list[int]
    present: Placement
    groups: int
    nodes: int
    ranks: int

    def placement(self, gain: float = 0.0) -> Placement:
        return place_experts(self.loads, self.present, self.groups, self.nodes, self.ranks, gain)

    def busiest(self, placement: Placement) -> float:
        return max(loads_of_ranks(self.loads, placement, self.ranks))

    def nodes_of_groups(self, placement: Placement) -> list[set[int]]:
        """Nodes that hold an expert of each group."""
        per_group, per_node = len(self.loads) // self.groups, len(placement) // self.nodes
        found: list[set[int]] = [set() for _ in range(self.groups)]
        for place, expert in enumerate(placement):
            found[expert // per_group].add(place // per_node)
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw numbers that divide each other; the present placement comes from other loads."""
    groups, nodes, a_node = (draw(st.sampled_from([1, 2, 3, 4, 8])) for _ in range(3))
    ranks = nodes * a_node
    experts = math.lcm(groups, ranks) * draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, draw(st.sampled_from([1, 10, 10**6]))), min_size=experts, max_size=experts)
    first = place_experts(draw(rows), contiguous(experts), groups, nodes, ranks)
    return Case(draw(rows), first, groups, nodes, ranks)


@given(cases())
def test_every_expert_has_one_place(case: Case) -> None:
    placement = case.placement()
    assert sorted(placement) == list(range(len(case.loads)))
    assert all(placement[place] == expert for expert, place in enumerate(places_of(placement)))


@given(cases())
def test_no_rank_is_busier_than_in_the_present_or_the_contiguous_placement(case: Case) -> None:
    placement = case.placement()
    assert case.busiest(placement) <= min(case.busiest(case.present), case.busiest(contiguous(len(case.loads))))


@given(cases())
def test_groups_stay_on_as_few_nodes_as_can_be_dealt_evenly(case: Case) -> None:
    nodes_in_a_set = case.nodes // math.gcd(case.groups, case.nodes)
    for nodes in case.nodes_of_groups(case.placement()):
        assert len({node // nodes_in_a_set for node in nodes}) == 1
        if case.groups % case.nodes == 0:
            assert len(nodes) == 1


@given(cases(), st.floats(0, 0.9))
def test_experts_move_only_for_the_configured_gain(case: Case, gain: float) -> None:
    placement = case.placement(gain)
    assert placement == case.present or case.busiest(placement) < case.busiest(case.present) * (1 - gain)


@given(cases())
def test_a_second_placement_for_the_same_loads_moves_nothing(case: Case) -> None:
    placement = case.placement()
    assert place_experts(case.loads, placement, case.groups, case.nodes, case.ranks) == placement


def test_the_packing_is_as_good_as_the_best_of_all_placements_in_small_layers() -> None:
    """Greedy packing need not be optimal; for these loads an exhaustive search finds no better placement."""
    for loads in ([9, 1, 8, 2, 7, 3, 6, 4], [90, 10, 10, 10, 60, 60, 10, 30], [5, 5, 5, 5, 1, 1, 1, 1]):
        found = max(loads_of_ranks(loads, place_experts(loads, contiguous(8), 1, 1, 4), 4))
        assert found == min(max(loads_of_ranks(loads, order, 4)) for order in itertools.permutations(range(8)))


def test_names_are_exchanged_so_that_little_moves() -> None:
    """Two pairs of experts exchange ranks; with the rank numbers of the packing all ranks but one would change."""
    loads = [50, 51, 10, 11, 40, 12, 13, 42]
    placement = place_experts(loads, contiguous(8), 1, 1, 4)
    assert max(loads_of_ranks(loads, contiguous(8), 4)) == 101
    assert max(loads_of_ranks(loads, placement, 4)) == 61
    assert [expert for place, expert in enumerate(placement) if expert != place] == [2, 0, 7, 4]


def test_without_loads_nothing_moves() -> None:
    assert place_experts([0] * 8, contiguous(8), 4, 2, 4) == contiguous(8)
    assert imbalance([0, 0]) == 1.0


@pytest.mark.parametrize("layer", EPLB, ids=range(len(EPLB)))
def test_replicas_are_those_of_deepseeks_eplb(layer: dict[str, Any]) -> None:
    """Experts agree place by place; the numbers of replicas differ, since torch's sort is not stable."""
    loads, ranks = layer["loads"], layer["ranks"]
    replicated = place_replicas(loads, layer["replicas"], layer["groups"], layer["nodes"], ranks)
    assert list(replicated.physical_to_logical) == layer["phy2log"]
    recorded = loads_of_ranks(loads, layer["phy2log"], ranks)
    assert loads_of_ranks(loads, replicated.physical_to_logical, ranks) == pytest.approx(recorded, rel=1e-12)


@given(cases(), st.integers(0, 3))
def test_replicas_fill_the_ranks_and_leave_no_expert_out(case: Case, more: int) -> None:
    replicas = len(case.loads) + more * case.ranks
    replicated = place_replicas(case.loads, replicas, case.groups, case.nodes, case.ranks)
    assert len(replicated.physical_to_logical) == replicas
    assert Counter(replicated.physical_to_logical) == dict(enumerate(replicated.counts)) and min(replicated.counts) >= 1
    for expert, places in enumerate(replicated.logical_to_physical):
        assert [replicated.physical_to_logical[place] for place in places] == [expert] * len(places)
    if case.groups % case.nodes == 0:
        assert all(len(nodes) == 1 for nodes in case.nodes_of_groups(replicated.physical_to_logical))


@given(cases())
def test_more_replicas_never_raise_the_load_of_the_fullest_one(case: Case) -> None:
    def fullest(replicas: int) -> float:
        counts = place_replicas(case.loads, replicas, 1, 1, case.ranks).counts
        return max(load / count for load, count in zip(case.loads, counts, strict=True))

    experts = len(case.loads)
    assert fullest(experts + case.ranks) <= fullest(experts) == max(case.loads)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((13, 4, 2, 4), r"replicas 13 must be a multiple of 4 ranks and at least the 12 experts \(nearest: 12 or 16\)"),
        ((8, 4, 2, 4), r"replicas 8 must be a multiple of 4 ranks and at least the 12 experts \(nearest: 12\)"),
        ((16, 5, 2, 4), r"groups 5 must divide the 12 experts \(nearest: 4 or 6\)"),
        ((16, 4, 3, 4), r"nodes 3 must divide the 4 ranks \(nearest: 2 or 4\)"),
        ((16, 4, 0, 4), r"nodes 0: it must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_nearest_that_do(
    numbers: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        place_replicas(list(range(12)), *numbers)
    with pytest.raises(UsageError, match="loads must be finite"):
        place_replicas([1.0, float("nan")], 2, 1, 1, 2)
