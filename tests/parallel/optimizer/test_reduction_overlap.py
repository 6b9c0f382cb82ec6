"""Gradient reduction during the last backward: the same bits as after it, and the same order on every replica."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer import sharded
from counterflow.parallel.optimizer.collectives import Collective
from counterflow.parallel.optimizer.sharded import ShardedOptimizer
from counterflow.tests.gather import gathered
from counterflow.tests.parallel.seen import Launch, recorded
from counterflow.tests.parallel.staged import CASES, Case, Part, initial, mirrored, plain, rounded_gradients
from counterflow.tests.pool import Pool, Worker

STEPS = 3


def optim(elements: int) -> OptimConfig:
    """Configuration with buckets that close at this number of elements."""
    return OptimConfig.model_validate(
        {"lr": 1e-2, "moments": "fp32", "clip_norm": 2.0, "bucket_mb": elements * 4 / 2**20}
    )


def stage_of(item: LocalParameter) -> int:
    """Stage of `item`; the embedding is in the first."""
    name = item.names[0]
    return 0 if name == "embedding" else int(name.split(".")[1])


def in_own_order(part: Part) -> list[list[LocalParameter]]:
    """Parameters of this rank by stage, as it finishes them: the upper half of the ranks begins at the low end."""
    stages = sorted({stage_of(item) for item in part.parameters}, reverse=True)
    if part.groups.coordinates.pp >= part.groups.layout.pp // 2:
        stages.reverse()
    return [[item for item in reversed(part.parameters) if stage_of(item) == stage] for stage in stages]


def _opposite_orders(worker: Worker, case: Case) -> dict[bool, dict[str, Any]]:
    """Train without and with overlap."""
    groups, runs = case.groups(), {}
    for overlapped in (False, True):
        part = Part(case, groups)
        optimizer = ShardedOptimizer(part.parameters, groups, optim(1))
        optimizer.initialise(initial)
        found: dict[str, Any] = {"early": [], "buckets": optimizer.num_buckets, "norms": []}
        with recorded() as seen:
            for step in range(STEPS):
                if overlapped:
                    optimizer.begin_step(part.expected())
                else:
                    optimizer.begin_step()
                for items in in_own_order(part):
                    part.backward(rounded_gradients(case, step), items)
                    found["early"].append(optimizer.launched_early)
                found["norms"].append(optimizer.reduce_gradients())
                found[f"gradients {step}"] = {n: t.to_local().clone() for n, t in optimizer.reduced_gradients().items()}
                optimizer.step(1e-2, found["norms"][-1])
        runs[overlapped] = {**found, "started": seen.of("reduce"), "published": part.published()}
    return runs


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_order(ranks: list[list[Launch]]) -> None:
    """Check that all members of a group start its reductions in one order."""
    for group in {launch.ranks for started in ranks for launch in started}:
        orders = {tuple(launch for launch in ranks[rank] if launch.ranks == group) for rank in group}
        assert len(orders) == 1, (group, orders)


@pytest.mark.parametrize("case", [mirrored(4, 4, 1), mirrored(8, 4, 1), mirrored(8, 4, 2), mirrored(8, 2, 2)], ids=str)
def test_mirrored_ranks_that_finish_in_opposite_orders_get_the_same_bits(pool: Pool, case: Case) -> None:
    ranks = pool.run(_opposite_orders, case.world, case)
    for during, after in ((rank[True], rank[False]) for rank in ranks):
        assert during["norms"] == after["norms"]
        for part in ("published", *(f"gradients {step}" for step in range(STEPS))):
            assert_same_bits(during[part], after[part])
        assert during["started"] == after["started"]
        assert after["early"] == [0, 0] * STEPS
    assert_same_order([rank[True]["started"] for rank in ranks])
    for index, rank in enumerate(ranks):
        during = rank[True]
        # Four parameters, if the rank began at the later stage; otherwise they are missing, and the others wait.
        began_at_later_stage = index < case.world // 2
        assert during["early"] == [4 if began_at_later_stage else 0, during["buckets"]] * STEPS


def _at_random(worker: Worker, case: Case, seed: int) -> dict[bool, dict[str, Any]]:
    """Train on gradients in any order, with some parameters unannounced: different ones on each replica."""
    groups, runs = case.groups(), {}
    for overlapped in (False, True):
        draw = random.Random(f"{seed} {worker.rank}")
        part = Part(case, groups)
        optimizer = ShardedOptimizer(part.parameters, groups, optim((1, 30, 90)[seed % 3]))
        gradients = rounded_gradients(case, seed)
        announced = {p: count for p, count in part.expected().items() if draw.random() < 0.9}
        waiting = {index: part.micro_batches(item) for index, item in enumerate(part.parameters)}
        turns = [index for index, batches in waiting.items() for _ in batches]
        draw.shuffle(turns)
        with recorded() as seen:
            optimizer.begin_step(announced if overlapped else None)
            for index in turns:
                part.accumulate(part.parameters[index], waiting[index].pop(0), gradients)
            norm = optimizer.reduce_gradients()
        reduced = {name: tensor.to_local() for name, tensor in optimizer.reduced_gradients().items()}
        runs[overlapped] = {"norm": norm, "reduced": reduced, "started": seen.launches}
    return runs


@pytest.mark.parametrize(("seed", "case"), list(enumerate(CASES)), ids=str)
def test_gradients_in_any_order_give_the_same_bits_and_one_order_a_group(pool: Pool, case: Case, seed: int) -> None:
    ranks = pool.run(_at_random, case.world, case, seed)
    for rank in ranks:
        assert rank[True]["norm"] == rank[False]["norm"]
        assert rank[True]["started"] == rank[False]["started"]
        assert_same_bits(rank[True]["reduced"], rank[False]["reduced"])
    assert_same_order([rank[True]["started"] for rank in ranks])


def _backwards_through_layers(worker: Worker) -> list[int]:
    """Number of launched reductions after each backward of two micro-batches through a stack of layers."""
    groups = Groups.create(Layout(2), "cpu")
    layers = [nn.Parameter(torch.ones(8, 4)) for _ in range(4)]
    local_parameters = [LocalParameter(layer, (f"layers.{i}",)) for i, layer in enumerate(layers)]
    optimizer = ShardedOptimizer(local_parameters, groups, optim(64))  # two layers per bucket
    optimizer.begin_step(dict.fromkeys(layers, 2))
    early = []
    for layer in [*reversed(layers), *reversed(layers)]:
        layer.sum().backward()
        early.append(optimizer.launched_early)
    # Rank 0 gets its sums while rank 1, which has started the reductions, waits for a message.
    if worker.rank == 0:
        for bucket in optimizer._buckets:
            bucket.finish_reduce()
        assert torch.equal(optimizer.reduced_gradients()["layers.0"].to_local(), torch.full((4, 4), 4.0))
        dist.send(torch.ones(1), 1, group=groups.world)
    else:
        dist.recv(torch.ones(1), 0, group=groups.world)
    optimizer.reduce_gradients()
    return early


def test_reductions_start_and_end_during_the_last_backward(pool: Pool) -> None:
    assert pool.run(_backwards_through_layers, 2) == [[0, 0, 0, 0, 0, 1, 1, 2]] * 2


def _unannounced(worker: Worker) -> tuple[list[int], float]:
    """Launched reductions and norm of three layers with two gradients each, unannounced for the middle layer."""
    groups = Groups.create(Layout(2), "cpu")
    layers = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    local_parameters = [LocalParameter(layer, (f"layers.{i}",)) for i, layer in enumerate(layers)]
    optimizer = ShardedOptimizer(local_parameters, groups, optim(4))
    optimizer.begin_step({layers[0]: 2, layers[2]: 2})
    early = []
    for layer in [*reversed(layers), *reversed(layers)]:
        layer.sum().backward()
        early.append(optimizer.launched_early)
    layers[1].sum().backward()
    return early, optimizer.reduce_gradients()


def test_an_unannounced_parameter_and_those_before_it_wait_for_the_end(pool: Pool) -> None:
    for early, norm in pool.run(_unannounced, 2):
        assert early == [0, 0, 0, 1, 1, 1]
        assert norm == pytest.approx((4 * (4**2 + 6**2 + 4**2)) ** 0.5, rel=1e-14)


def _with_deferred(worker: Worker, case: Case) -> tuple[list[str], int, int]:
    """Compute each weight gradient by backward on the leaf alone, as the queue of W does: the hook gets it."""
    part = Part(case, case.groups())
    optimizer = ShardedOptimizer(part.parameters, part.groups, optim(1))
    optimizer.begin_step(part.expected())
    for item in reversed(part.parameters):
        for _ in part.micro_batches(item):
            torch.autograd.backward(item.parameter, torch.ones_like(item.parameter))
    early = optimizer.launched_early
    kept = [item.names[0] for item in part.parameters if item.parameter.grad is not None]
    optimizer.reduce_gradients()
    for name, tensor in optimizer.reduced_gradients().items():
        assert torch.equal(gathered(tensor), torch.full(case.shapes[name], 8.0)), name
    return kept, early, optimizer.num_buckets


def test_gradients_of_a_leaf_itself_count_as_any_other(pool: Pool) -> None:
    for kept, early, buckets in pool.run(_with_deferred, 4, mirrored(4, 2, 2)):
        assert kept == []
        assert early == buckets


def _extra(worker: Worker, when: str) -> str:
    groups = Groups.create(Layout(worker.world_size), "cpu")
    layers = {name: nn.Parameter(torch.ones(4)) for name in ("first", "last")}
    local_parameters = [LocalParameter(layer, (name,)) for name, layer in layers.items()]
    optimizer = ShardedOptimizer(local_parameters, groups, optim(4))
    optimizer.begin_step({layers["last"]: 1, layers["first"]: 2} if when != "unannounced" else None)
    layers["first"].sum().backward()
    if when != "final":
        layers["last"].sum().backward()
    else:  # the first bucket may not start before the last one
        layers["first"].sum().backward()
    if when == "unannounced":
        optimizer.reduce_gradients()
    with pytest.raises(AssertionError) as refused:
        layers["first" if when == "final" else "last"].sum().backward()
    if when != "unannounced":
        optimizer.reduce_gradients()
    return str(refused.value)


@pytest.mark.parametrize("world", [1, 2])
def test_a_gradient_too_many_is_refused_with_the_parameters_name(pool: Pool, world: int) -> None:
    reduced = "last got a gradient after its gradients were reduced"
    assert pool.run(_extra, world, "launched") == [reduced] * world
    assert pool.run(_extra, world, "unannounced") == [reduced] * world
    assert pool.run(_extra, world, "final") == ["first got a gradient more than announced for this step"] * world


def _steps_of_both_kinds(worker: Worker) -> list[float]:
    """Norms of a step with overlap, one without, and one without gradients; each is computed twice."""
    case = plain(4, 4, 1)
    part = Part(case, case.groups())
    optimizer = ShardedOptimizer(part.parameters, part.groups, optim(30))
    norms = []
    for expected in (part.expected(), None, part.expected()):
        optimizer.begin_step(expected)
        if len(norms) < 4:
            part.backward(rounded_gradients(case, 0))
            assert optimizer.launched_early == (optimizer.num_buckets if expected else 0)
        norms += [optimizer.reduce_gradients(), optimizer.reduce_gradients()]
    assert optimizer.launched_early == 0
    with pytest.raises(AssertionError, match="does not hold"):
        optimizer.begin_step({nn.Parameter(torch.ones(1)): 1})
    return norms


def test_steps_with_and_without_overlap_may_follow_each_other(pool: Pool) -> None:
    for norms in pool.run(_steps_of_both_kinds, 4):
        assert norms[0] > 0 and set(norms[:4]) == {norms[0]}
        assert norms[4:] == [0.0, 0.0]


def _bounded(worker: Worker, done: bool) -> dict[str, Any]:
    """Train a step on six layers with room for two packed buckets, and one without a bound.

    With `done` a reduction has ended as soon as anybody asks, as on a fast GPU.
    """
    found: dict[str, Any] = {}
    groups = Groups.create(Layout(2), "cpu")
    for bound in (2 * 64, 2**30):  # a bucket's two shards of two rows, one of them padding, are 64 bytes
        layers = [nn.Parameter(torch.ones(3, 4)) for _ in range(6)]
        local_parameters = [LocalParameter(layer, (f"layers.{i}",)) for i, layer in enumerate(layers)]
        optimizer = ShardedOptimizer(local_parameters, groups, optim(1))
        with (
            patch.object(sharded, "PACKED_BYTES", bound),
            patch.object(Collective, "done", done),
            recorded() as seen,
        ):
            optimizer.begin_step(dict.fromkeys(layers, 1))
            for number, layer in enumerate(reversed(layers)):
                (layer * (number + worker.rank + 1)).sum().backward()
            early = optimizer.launched_early
            optimizer.reduce_gradients()
        waiting, most = 0, 0
        for event in seen.events:
            waiting += 1 if event > 0 else -1
            most = max(most, waiting)
        reduced = {name: gathered(tensor) for name, tensor in optimizer.reduced_gradients().items()}
        found["bounded" if bound < 2**30 else "free"] = (early, most, seen.launches, reduced)
    return found


@pytest.mark.parametrize("done", [False, True])
def test_no_more_packed_gradients_are_under_way_than_there_is_room_for(pool: Pool, done: bool) -> None:
    for found in pool.run(_bounded, 2, done):
        early, most, launches, reduced = found["bounded"]
        assert (early, most) == ((6, 1) if done else (2, 2))
        free = found["free"]
        assert free[:2] == ((6, 1) if done else (6, 6))
        assert launches == free[2] and len(launches) == 6
        assert_same_bits(reduced, free[3])


def _as_they_lie(worker: Worker) -> tuple[list[int], bool]:
    """Bytes packed for a matrix whose rows both ranks divide, a stack, and a matrix with padding; and their sums."""
    groups = Groups.create(Layout(2), "cpu")
    shapes = {"even": (4, 3), "stack": (2, 4, 3), "odd": (3, 3)}
    layers = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    local_parameters = [
        LocalParameter(layer, (name,) if layer.dim() == 2 else (f"{name}.0", f"{name}.1"))
        for name, layer in layers.items()
    ]
    optimizer = ShardedOptimizer(local_parameters, groups, optim(1))
    optimizer.begin_step(dict.fromkeys(layers.values(), 1))
    for number, layer in enumerate(layers.values()):
        (layer * (torch.arange(layer.numel()).view(layer.shape) + number + worker.rank)).sum().backward()
    optimizer.reduce_gradients()
    right = True
    for name, tensor in optimizer.reduced_gradients().items():
        kind, _, part = name.partition(".")
        number, size = list(shapes).index(kind), 9 if kind == "odd" else 12
        values = torch.arange(size).view(-1, 3) + number + 12 * int(part or 0)
        right = right and torch.equal(gathered(tensor), (2.0 * values + 1))
    return [bucket.packed_bytes for bucket in optimizer._buckets], right


def test_gradients_that_lie_in_the_order_of_shards_are_sent_without_a_copy(pool: Pool) -> None:
    assert pool.run(_as_they_lie, 2) == [([0, 24 * 4, 12 * 4], True)] * 2
