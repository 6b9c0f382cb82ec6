"""The sharded optimizer, against torch's AdamW over whole tensors and against itself in other layouts.

Gradients are multiples of 1/256, so their sums are exact in FP32 whatever their order: layouts must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
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
from counterflow.tests.pool import Pool, Worker

EXPERTS = 4
MICRO_BATCHES = 4  # of each step, shared by the ranks
# Rows that 2 and 4 ranks do not divide, fewer rows than ranks, a single row, and one dimension.
DENSE = {"matrix": (7, 5), "flat": (3, 4), "row": (1, 8), "gain": (6,), "scalar": (1,), "even": (8, 2)}
EXPERT = {"w1": (5, 4), "w3": (5, 4), "w2": (3, 5)}
SHAPES = DENSE | {f"experts.{e}.{w}": shape for e in range(EXPERTS) for w, shape in EXPERT.items()}
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # world size, ep


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def gradient(name: str, step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step + 10 * micro_batch)
    return torch.randint(-200, 200, SHAPES[name], generator=generator) / 256


def optim(**keys: Any) -> OptimConfig:
    return OptimConfig.model_validate({"moments": "fp32", "clip_norm": None, **keys})


class Model:
    """Parameters as a rank of `groups` holds them: all that is dense, and its own experts stacked."""

    def __init__(self, groups: Groups, dtype: torch.dtype) -> None:
        per_rank = EXPERTS // groups.layout.ep
        first = groups.coordinates.ep * per_rank
        mine = range(first, first + per_rank)
        self.groups = groups
        self.placed = [LocalParameter(parameter(shape, dtype), (name,)) for name, shape in DENSE.items()]
        for projections in (("w1", "w3"), ("w2",)):
            rows, columns = EXPERT[projections[0]]
            stack = parameter((per_rank, len(projections) * rows, columns), dtype)
            self.placed.append(
                LocalParameter(stack, tuple(f"experts.{e}.{w}" for e in mine for w in projections), "edp")
            )

    def backward(self, of: Callable[[str, int], Tensor]) -> None:
        """Run this rank's micro-batches; `of(name, micro_batch)` is the gradient of a global tensor."""
        for item in self.placed:
            group = self.groups.dp if item.replicas == "dp" else self.groups.edp
            share = MICRO_BATCHES // group.size()
            for micro_batch in range(dist.get_rank(group) * share, (dist.get_rank(group) + 1) * share):
                wanted = torch.stack([of(name, micro_batch) for name in item.names]).view(item.parameter.shape)
                (item.parameter * wanted.to(item.parameter.dtype)).sum().backward()


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def trained(
    worker: Worker, ep: int, config: OptimConfig, steps: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Train; whole state, published parameters and reduced gradients by global name, and each step's norm."""
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    model = Model(groups, dtype)
    optimizer = ShardedOptimizer(model.placed, groups, config)
    optimizer.initialise(initial)
    norms = []
    for step in range(steps):
        optimizer.begin_step()
        model.backward(lambda name, micro_batch, step=step: gradient(name, step, micro_batch))
        norms.append(optimizer.reduce_gradients())
        optimizer.step(config.lr.at(0), norms[-1])
    published = {n: t.clone() for item in model.placed for n, t in zip(item.names, item.tensors(), strict=True)}
    state = {name: gathered(tensor) for name, tensor in optimizer.state().items()}
    gradients = {name: gathered(tensor) for name, tensor in optimizer.reduced_gradients().items()}
    return {"published": published, "state": state, "gradients": gradients, "norms": norms}


def merged(ranks: list[dict[str, Any]], part: str) -> dict[str, Tensor]:
    """The global tensors of all ranks; those that several hold are bit-equal."""
    whole: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor in rank[part].items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"replicas of {name} differ"
    return whole


def torch_adamw(config: OptimConfig, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights and moments after `steps` of torch.optim.AdamW and clip_grad_norm_ over whole tensors, and the norms."""
    weights = {name: nn.Parameter(initial(name, shape)) for name, shape in SHAPES.items()}
    decayed = [p for p in weights.values() if p.dim() > 1]
    exempt = [p for p in weights.values() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}],
        lr=config.lr.at(0),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    norms = []
    for step in range(steps):
        for name, weight in weights.items():
            weight.grad = sum((gradient(name, step, m) for m in range(MICRO_BATCHES)), torch.zeros(SHAPES[name]))
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), config.clip_norm or float("inf"))))
        adamw.step()
    state = {f"{key}.{name}": adamw.state[w][key] for name, w in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    return {name: weight.detach() for name, weight in weights.items()}, state, norms


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("clip_norm", [None, 1.5], ids=["unclipped", "clipped"])
def test_fifty_steps_equal_torchs_adamw(pool: Pool, clip_norm: float | None) -> None:
    config = optim(lr=3e-3, weight_decay=0.1, clip_norm=clip_norm)
    ours = pool.run(trained, 1, 1, config, 50)[0]
    weights, moments, norms = torch_adamw(config, 50)
    assert ours["norms"] == pytest.approx(norms, rel=1e-6)
    for name, expected in moments.items():
        torch.testing.assert_close(ours["state"][name], expected, rtol=2e-5, atol=1e-6)
    for name, expected in weights.items():
        torch.testing.assert_close(ours["published"][name], expected, rtol=1e-5, atol=1e-6)
        assert (expected - initial(name, SHAPES[name])).abs().max() > 0.01, "these weights should have moved"


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_layout_has_the_state_of_one_process(pool: Pool, world: int, ep: int, dtype: torch.dtype) -> None:
    config = optim(lr=1e-2, clip_norm=2.0, moments="bf16" if dtype == torch.bfloat16 else "fp32")
    alone = pool.run(trained, 1, 1, config, 4, dtype)[0]
    ranks = pool.run(trained, world, ep, config, 4, dtype)
    for part in ("state", "published", "gradients"):
        assert_same_bits(merged(ranks, part), alone[part])
    assert len({tuple(rank["norms"]) for rank in ranks}) == 1
    assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-14)
    assert {name.removeprefix("weights.") for name in alone["state"] if name.startswith("weights.")} == set(SHAPES)


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 2)])
def test_many_buckets_give_the_bits_of_one(pool: Pool, world: int, ep: int) -> None:
    one = pool.run(trained, world, ep, optim(clip_norm=1.0), 3)
    many = pool.run(trained, world, ep, optim(clip_norm=1.0, bucket_mb=30 * 4 / 2**20), 3)
    for part in ("state", "published", "gradients"):
        assert_same_bits(merged(one, part), merged(many, part))


def test_bf16_moments_stay_close_to_fp32_ones(pool: Pool) -> None:
    config = {"lr": 1e-3, "weight_decay": 0.0}
    exact = pool.run(trained, 1, 1, optim(**config), 30)[0]
    rounded = pool.run(trained, 1, 1, optim(**config, moments="bf16"), 30)[0]
    for name, tensor in rounded["state"].items():
        assert tensor.dtype == (torch.float32 if name.startswith("weights.") else torch.bfloat16)
    for name, shape in SHAPES.items():
        moved = (exact["published"][name] - initial(name, shape)).abs().max()
        difference = (exact["published"][name] - rounded["published"][name]).abs().max()
        # A BF16 number is within 1/512 of the exact one, and errors of 30 steps partly cancel.
        assert 0 < difference < moved / 100


def test_only_tensors_of_more_than_one_dimension_decay(pool: Pool) -> None:
    none = pool.run(trained, 1, 1, optim(lr=1e-2, weight_decay=0.0), 2)[0]["published"]
    some = pool.run(trained, 1, 1, optim(lr=1e-2, weight_decay=0.5), 2)[0]["published"]
    assert {name for name in SHAPES if torch.equal(none[name], some[name])} == {"gain", "scalar"}


def test_published_parameters_are_the_rounded_master_weights(pool: Pool) -> None:
    ranks = pool.run(trained, 4, 2, optim(lr=1e-2), 3, torch.bfloat16)
    state = merged(ranks, "state")
    for name, published in merged(ranks, "published").items():
        assert published.dtype == torch.bfloat16
        assert torch.equal(published, state[f"weights.{name}"].bfloat16())
        assert not torch.equal(published.float(), state[f"weights.{name}"]), "master weights hold more than BF16"


def _sum_of_ones(worker: Worker, count: int) -> tuple[Tensor, bool, float]:
    groups = Groups.create(Layout(worker.world_size), "cpu")
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    optimizer = ShardedOptimizer([LocalParameter(weight, ("w",))], groups, optim())
    for _ in range(count):
        weight.sum().backward()
    kept = weight.grad is not None
    norm = optimizer.reduce_gradients()
    return gathered(optimizer.reduced_gradients()["w"]), kept, norm


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_gradients_are_accumulated_in_fp32(pool: Pool, world: int) -> None:
    # In BF16, 256 + 1 is 256: the sum of 300 ones would stand still there.
    for total, kept, norm in pool.run(_sum_of_ones, world, 300):
        assert torch.equal(total, torch.full((3, 2), 300.0 * world))
        assert norm == pytest.approx(300 * world * 6**0.5, rel=1e-14)
        assert not kept, "a micro-batch's BF16 gradient is not kept"


def _norm_of_ones(worker: Worker, ep: int) -> float:
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    model = Model(groups, torch.float32)
    optimizer = ShardedOptimizer(model.placed, groups, optim())
    optimizer.begin_step()
    model.backward(lambda name, micro_batch: torch.full(SHAPES[name], 1 / MICRO_BATCHES))
    return optimizer.reduce_gradients()


@pytest.mark.parametrize(("world", "ep"), [(1, 1), *LAYOUTS])
def test_gradients_of_one_have_the_norm_of_the_parameter_count(pool: Pool, world: int, ep: int) -> None:
    count = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for norm in pool.run(_norm_of_ones, world, ep):
        assert norm == pytest.approx(count**0.5, rel=1e-12)


def _views(worker: Worker) -> bool:
    groups = Groups.create(Layout(worker.world_size), "cpu")
    weight = nn.Parameter(torch.empty(5, 2))
    optimizer = ShardedOptimizer([LocalParameter(weight, ("w",))], groups, optim())
    optimizer.initialise(initial)
    optimizer.state()["weights.w"].to_local().fill_(7.0)
    optimizer.publish()
    return bool((weight == 7.0).all())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_written_to_the_state_is_what_training_goes_on_with(pool: Pool, world: int) -> None:
    assert pool.run(_views, world) == [True] * world
