"""Measures of balance against their definitions, per layer, rank and node."""

from __future__ import annotations

import statistics

import pytest
import torch

from counterflow.report.balance import excess, measure_balance, variation
from counterflow.report.metrics import StepMetrics


def over_mean(loads: list[float]) -> float:
    mean = sum(loads) / len(loads)
    return (max(loads) - mean) / mean


def counts(layers: int = 7, experts: int = 16) -> torch.Tensor:
    return torch.randint(0, 1000, (layers, experts), generator=torch.Generator().manual_seed(0))


def test_each_measure_of_experts_follows_its_definition() -> None:
    loads = counts()
    dropped = torch.arange(7)
    found = measure_balance(loads, dropped, [0] * 16, [0])
    rows = loads.tolist()
    assert found.max_vio == pytest.approx([over_mean(row) for row in rows], rel=1e-12)
    assert found.load_cv == pytest.approx([statistics.pstdev(row) / statistics.fmean(row) for row in rows], rel=1e-12)
    assert found.dropped == pytest.approx([layer / sum(row) for layer, row in enumerate(rows)], rel=1e-12)
    assert (found.rank_vio, found.node_vio) == (None, None), "a single rank has nothing to compare"


def test_loads_of_ranks_and_nodes_are_the_sums_over_the_experts_they_hold() -> None:
    loads, permuted = counts(), torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    node_of_rank = [3, 3, 7, 7]  # ranks 0 and 1 on one node, 2 and 3 on another
    for rank_of_expert in ([expert // 4 for expert in range(16)], [expert % 4 for expert in permuted]):
        found = measure_balance(loads, torch.zeros(7), rank_of_expert, node_of_rank)
        assert found.rank_vio is not None and found.node_vio is not None
        for layer, row in enumerate(loads.tolist()):
            ranks = [sum(n for n, at in zip(row, rank_of_expert, strict=True) if at == rank) for rank in range(4)]
            assert found.rank_vio[layer] == pytest.approx(over_mean(ranks), rel=1e-12)
            assert found.node_vio[layer] == pytest.approx(over_mean([ranks[0] + ranks[1], ranks[2] + ranks[3]]))


def test_layers_may_hold_their_experts_on_different_ranks() -> None:
    loads = torch.tensor([[9, 1, 1, 1], [9, 1, 1, 1]])
    found = measure_balance(loads, torch.zeros(2), [[0, 0, 1, 1], [0, 1, 1, 1]], [0, 0])
    assert found.rank_vio == pytest.approx([10 / 6 - 1, 9 / 6 - 1])
    assert found.node_vio is None


def test_measures_at_perfect_balance_and_at_its_opposite() -> None:
    assert excess(torch.full((3, 8), 5)) == variation(torch.full((3, 8), 5)) == (0.0, 0.0, 0.0)
    assert excess(torch.tensor([[32, 0, 0, 0]])) == (3.0,)  # all on one of four: E - 1
    assert variation(torch.tensor([[32, 0, 0, 0]])) == pytest.approx((3**0.5,))
    assert excess(torch.tensor([[0, 0], [2, 0]])) == variation(torch.tensor([[0, 0], [2, 0]])) == (0.0, 1.0)
    assert measure_balance(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1), [0, 0], [0]).dropped == (0.0,)
    with pytest.raises(ValueError, match=r"\[layers, experts\]"):
        excess(torch.zeros(4))


def test_summary_is_the_mean_and_the_worst_layer_of_each_under_names_of_the_metrics() -> None:
    loads = counts()
    found = measure_balance(loads, torch.arange(7), [expert // 8 for expert in range(16)], [0, 0])
    summary = found.summary()
    assert summary.keys() <= StepMetrics.model_fields.keys()
    assert summary["max_vio"] == pytest.approx(sum(found.max_vio) / 7)
    assert summary["load_cv_worst"] == max(found.load_cv)
    assert found.rank_vio is not None and summary["rank_vio_worst"] == max(found.rank_vio)
    assert (summary["node_vio"], summary["node_vio_worst"]) == (None, None)
