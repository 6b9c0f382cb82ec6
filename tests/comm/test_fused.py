"""Dispatch by fused kernels: their formulas on CPU tensors give the bits of the plain operations, in few launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm import flat, two_hop
from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire, PlainWire
from counterflow.tests.comm.launches import Size, launches_of
from counterflow.tests.comm.layer import Case, outputs_and_gradients
from counterflow.tests.comm.routings import random_routing
from counterflow.tests.pool import Pool, Worker

NODES = [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 2]]


@contextmanager
def fused(active: bool) -> Iterator[None]:
    with (
        mock.patch.object(flat, "takes_fused_kernels", return_value=active),
        mock.patch.object(two_hop, "takes_fused_kernels", return_value=active),
    ):
        yield


def _round_trip(case: Case, worker: Worker, dispatcher: RoutedDispatcher) -> dict[str, Any]:
    """Rows that arrive, and without matrix products the sums and gradients that come back."""
    rank = worker.rank
    x, weights = case.x[rank].clone().requires_grad_(), case.weights[rank].clone().requires_grad_()
    dispatched = dispatcher.dispatch(x, case.expert_ids[rank], weights)
    y = (dispatched.x.float() * dispatched.weights[:, None]).to(x.dtype)
    out = dispatcher.combine(y, dispatched)
    out.backward(case.grads[rank])
    assert x.grad is not None and weights.grad is not None
    found = {"rows": dispatched.x, "row weights": dispatched.weights, "offsets": dispatched.offsets, "out": out}
    found |= {"x": x.grad, "weights": weights.grad, "per expert": torch.tensor(dispatched.tokens_per_expert)}
    if dispatched.codes is not None:
        found |= {"codes": dispatched.codes.data.view(torch.uint8), "scales": dispatched.codes.scale}
    return {name: value.detach() for name, value in found.items()}


def _compare(worker: Worker, kind: str, dtype: torch.dtype, fp8: bool, seeds: range) -> None:
    for seed in seeds:
        case = random_routing(seed, worker.world_size, dtype)
        if fp8 and seed % 2:  # widths of messages that no 16 divides
            case = random_routing(seed, worker.world_size, dtype, hidden=150)
        options = DispatchOptions(1 + 3 * (seed % 2), FP8Wire() if fp8 else PlainWire())
        nodes = NODES[seed % len(NODES)][: worker.world_size]

        def dispatcher(experts: int = len(case.up), options: Any = options, nodes: Any = nodes) -> RoutedDispatcher:
            if kind == "flat":
                return FlatDispatcher(dist.group.WORLD, experts, options)
            return TwoHopDispatcher(dist.group.WORLD, experts, options, nodes)

        with fused(False):
            expected = _round_trip(case, worker, dispatcher())
        with fused(True):
            found = _round_trip(case, worker, dispatcher())
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), f"routing {seed}: {name}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["flat", "two-hop"])
@pytest.mark.parametrize(("dtype", "fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_fused_kernels_have_the_bits_of_plain_operations(
    kind: str, dtype: torch.dtype, fp8: bool, ranks: int, pool: Pool
) -> None:
    pool.run(_compare, ranks, kind, dtype, fp8, range(0, 40, 40 // (5 * ranks)))


def test_a_layer_has_the_same_gradients(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for seed in range(0, 20, 3):
            case = random_routing(seed, 4)
            for kind in (FlatDispatcher, TwoHopDispatcher):
                found: list[dict[str, Tensor]] = []
                for active in (False, True):
                    with fused(active):
                        dispatcher = kind(dist.group.WORLD, len(case.up))
                        found.append(outputs_and_gradients(case, worker.rank, 4, dispatcher))
                assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]), (seed, kind)

    pool.run(compare, 4)


SMALL = Size([0, 0, 1, 1], 8, 3, 32, 64, 2)


@pytest.mark.parametrize(("kind", "most"), [("flat", 22), ("two-hop", 31)])
def test_a_gpu_launches_few_kernels(kind: str, most: int) -> None:
    for options in (DispatchOptions(), DispatchOptions(16)):
        launches = launches_of(kind, SMALL, options)
        assert sum(launches.totals().values()) <= most, launches.seen
        assert sum(seen["to the host"] for seen in launches.seen.values()) == 1
