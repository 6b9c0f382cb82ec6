"""Dispatch that fills each expert's rows up with zeros: everything but the number of rows is as without."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.routed import DispatchOptions
from counterflow.tests.comm.layer import make_case, outputs_and_gradients
from counterflow.tests.comm.test_flat import ROUTINGS
from counterflow.tests.pool import Pool, Worker


def _compare(worker: Worker, alignment: int) -> None:
    for number, (tokens, experts, top_k, candidates) in enumerate(ROUTINGS):
        case = make_case(number, tokens[: worker.world_size], experts, top_k, torch.float32, candidates)
        plain = FlatDispatcher(dist.group.WORLD, experts)
        aligned = FlatDispatcher(dist.group.WORLD, experts, DispatchOptions(alignment))
        expected = outputs_and_gradients(case, worker.rank, worker.world_size, plain)
        found = outputs_and_gradients(case, worker.rank, worker.world_size, aligned)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            # A row's products do not depend on how many rows there are; sums over rows of zeros may be ordered anew.
            assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), f"routing {number}: {name}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layer_and_gradients_are_those_without(ranks: int, pool: Pool) -> None:
    for alignment in (2, 16):
        pool.run(_compare, ranks, alignment)


def _look(worker: Worker) -> None:
    for number, (tokens, experts, top_k, candidates) in enumerate(ROUTINGS):
        case = make_case(number, tokens[: worker.world_size], experts, top_k, torch.bfloat16, candidates)
        given = case.x[worker.rank], case.expert_ids[worker.rank], case.weights[worker.rank]
        plain = FlatDispatcher(dist.group.WORLD, experts).dispatch(*given)
        wide = FlatDispatcher(dist.group.WORLD, experts, DispatchOptions(4)).dispatch(*given)
        assert wide.tokens_per_expert == [-(-count // 4) * 4 for count in plain.tokens_per_expert]
        assert wide.offsets.tolist() == torch.tensor(wide.tokens_per_expert).cumsum(0).tolist()
        assert wide.x.shape[0] == wide.weights.shape[0] == sum(wide.tokens_per_expert)
        groups = zip(
            wide.x.split(wide.tokens_per_expert),
            plain.x.split(plain.tokens_per_expert),
            wide.weights.split(wide.tokens_per_expert),
            plain.weights.split(plain.tokens_per_expert),
            strict=True,
        )
        for rows, expected, weights, expected_weights in groups:
            count = len(expected)
            assert torch.equal(rows[:count], expected) and not rows[count:].any()
            assert torch.equal(weights[:count], expected_weights) and not weights[count:].any()
        # What experts make of the rows of zeros does not matter.
        y = torch.full_like(wide.x, float("nan"))
        for rows, expected in zip(y.split(wide.tokens_per_expert), plain.x.split(plain.tokens_per_expert), strict=True):
            rows[: len(expected)] = expected
        combined = FlatDispatcher(dist.group.WORLD, experts, DispatchOptions(4)).combine(y, wide)
        assert torch.equal(combined, FlatDispatcher(dist.group.WORLD, experts).combine(plain.x, plain))


@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_of_zeros_come_after_each_experts_own(ranks: int, pool: Pool) -> None:
    pool.run(_look, ranks)
