"""Formats in which gradients are sent: the sums, the order of addition, and the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer.sharded import ShardedOptimizer
from counterflow.tests.gather import gathered
from counterflow.tests.parallel.seen import Seen, recorded
from counterflow.tests.parallel.staged import CASES, Case, Part, initial, rounded_gradients
from counterflow.tests.pool import Pool, Worker


def optim(reduce: str, elements: int = 30) -> OptimConfig:
    """Configuration with buckets that close at this number of elements."""
    return OptimConfig.model_validate(
        {"lr": 1e-2, "moments": "fp32", "clip_norm": None, "bucket_mb": elements * 4 / 2**20, "reduce": reduce}
    )


def to_bf16(tensor: Tensor) -> Tensor:
    """Round FP32 to the nearest multiple of the last of BF16's 8 bits, ties to even: the upper half of the word."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def _reduced(worker: Worker, case: Case, reduce: str) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """The sum of each global tensor and the gradients of the group's ranks, in their order."""
    part = Part(case, case.groups())
    optimizer = ShardedOptimizer(part.parameters, part.groups, optim(reduce))
    optimizer.begin_step(part.expected())
    part.backward(rounded_gradients(case, 0))
    own = {name: tensor.clone() for name, tensor in optimizer.gradients().items()}
    optimizer.reduce_gradients()
    sums = {name: gathered(tensor) for name, tensor in optimizer.reduced_gradients().items()}
    found = {}
    for item in part.parameters:
        group = part.groups.replicas(item.replicas, item.holders).get_group()
        for name in item.names:
            parts = [torch.empty_like(own[name]) for _ in range(group.size())]
            dist.all_gather(parts, own[name].contiguous(), group=group)
            found[name] = sums[name], parts
    return found


@pytest.mark.parametrize("reduce", ["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_fp32_in_the_order_of_the_ranks(pool: Pool, case: Case, reduce: str) -> None:
    several = 0
    for found in pool.run(_reduced, case.world, case, reduce):
        for name, (total, parts) in found.items():
            parts = [part.view_as(total) for part in parts]
            if reduce == "bf16" and len(parts) > 1:  # a single rank sends nothing and rounds nothing
                several += 1
                assert any(not torch.equal(part, to_bf16(part)) for part in parts), "rounding has to show"
                parts = [to_bf16(part) for part in parts]
            expected = parts[0].clone()
            for part in parts[1:]:
                expected = expected + part
            assert torch.equal(total, expected), name
    assert several or reduce == "fp32"


def _small_after_large(worker: Worker) -> tuple[float, float]:
    """Sum of 1 on the first rank and 2^-9 on each of the others, and the sum in BF16 arithmetic."""
    groups = Groups.create(Layout(worker.world_size), "cpu")
    weight = nn.Parameter(torch.ones(worker.world_size))
    optimizer = ShardedOptimizer([LocalParameter(weight, ("w",))], groups, optim("bf16"))
    optimizer.begin_step({weight: 1})
    value = 1.0 if worker.rank == 0 else 2.0**-9
    (weight * value).sum().backward()
    optimizer.reduce_gradients()
    rough = torch.ones((), dtype=torch.bfloat16)
    for _ in range(worker.world_size - 1):
        rough += 2.0**-9
    return float(optimizer.reduced_gradients()["w"].to_local()), float(rough)


def test_small_contributions_are_not_lost_beside_a_large_one(pool: Pool) -> None:
    assert pool.run(_small_after_large, 8) == [(1 + 7 / 512, 1.0)] * 8


def _bytes(worker: Worker, ep: int, reduce: str, dtype: torch.dtype) -> tuple[int, int, Seen, dict[str, int]]:
    """Elements that dp and edp share, the launches of a step, and the bytes that the meter counts."""
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    dense, experts = nn.Parameter(torch.empty(16, 5, dtype=dtype)), nn.Parameter(torch.empty(2, 8, 3, dtype=dtype))
    names = tuple(f"experts.{e}" for e in range(2 * groups.coordinates.ep, 2 * groups.coordinates.ep + 2))
    local_parameters = [LocalParameter(dense, ("dense",)), LocalParameter(experts, names, "edp")]
    optimizer = ShardedOptimizer(local_parameters, groups, optim(reduce))
    optimizer.initialise(initial)
    groups.meter.take()
    with recorded() as seen:
        optimizer.begin_step({dense: 1, experts: 1})
        (dense.sum() + experts.sum()).backward()
        optimizer.step(1e-2, optimizer.reduce_gradients(), blocking=False)
        optimizer.finish_gathers()
    counted: dict[str, int] = {}
    for kind, tally in groups.meter.take().items():
        counted[kind.purpose] = counted.get(kind.purpose, 0) + tally.bytes
    return dense.numel(), experts.numel(), seen, counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["weights-fp32", "weights-bf16"])
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2), (4, 1), (8, 2)])
def test_bytes_are_those_of_the_formats(pool: Pool, world: int, ep: int, dtype: torch.dtype) -> None:
    edp, sent = world // ep, {}
    for reduce, width in (("fp32", 4), ("bf16", 2)):
        for dense, experts, seen, counted in pool.run(_bytes, world, ep, reduce, dtype):
            elements = [dense * (world - 1) // world, experts * (edp - 1) // edp]
            assert [launch.sent for launch in seen.of("gather")] == [dtype.itemsize * n for n in elements]
            assert [launch.sent for launch in seen.of("reduce")] == [width * n for n in reversed(elements)]
            sent[reduce] = sum(launch.sent for launch in seen.of("reduce"))
            assert counted["gradients"] == sent[reduce]
            assert counted["weights"] == sum(launch.sent for launch in seen.of("gather"))
    assert sent["fp32"] == 2 * sent["bf16"] > 0


def _non_finite(worker: Worker, value: float) -> tuple[float, Any]:
    groups = Groups.create(Layout(2), "cpu")
    weight = nn.Parameter(torch.ones(4))
    optimizer = ShardedOptimizer([LocalParameter(weight, ("w",))], groups, optim("bf16"))
    optimizer.begin_step()
    factor = torch.tensor([1.0, 1.0, value if worker.rank else 1.0, 1.0])
    (weight * factor).sum().backward()
    norm = optimizer.reduce_gradients()
    return norm, optimizer.reduced_gradients()["w"].to_local().isfinite().tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradients_stay_so(pool: Pool, value: float) -> None:
    (norm, first), (same, second) = pool.run(_non_finite, 2, value)
    assert not torch.tensor([norm, same]).isfinite().any()
    assert (first, second) == ([True, True], [False, True])
