"""Parameters that several pipeline ranks hold: mirrored stages of DualPipe, the embedding on first and last stage.

The reference is a single process that holds every tensor once; test_sharded.py compares it with torch's AdamW.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer.sharded import ShardedOptimizer
from counterflow.tests.gather import gathered
from counterflow.tests.parallel.staged import (
    CASES,
    MICRO_BATCHES,
    Case,
    Part,
    exact_gradients,
    initial,
    mirrored,
    plain,
    rounded_gradients,
)
from counterflow.tests.pool import Pool, RankFailure, Worker


def optim(**keys: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1e-2, "moments": "fp32", "clip_norm": 2.0, **keys})


Gradients = Callable[[Case, int], Callable[[str, int], Tensor]]


def trained(worker: Worker, case: Case, gradients: Gradients, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Train; returns published parameters, state, reduced gradients, norms, and the elements of state on this rank."""
    part = Part(case, case.groups(), dtype)
    config = optim(moments="fp32" if dtype == torch.float32 else "bf16")
    optimizer = ShardedOptimizer(part.parameters, part.groups, config)
    optimizer.initialise(initial)
    norms = []
    for step in range(steps):
        optimizer.begin_step(part.expected())
        part.backward(gradients(case, step))
        norms.append(optimizer.reduce_gradients())
        optimizer.step(config.lr.at(0), norms[-1])
    state = optimizer.state()
    return {
        "published": part.published(),
        "state": {name: gathered(tensor) for name, tensor in state.items()},
        "gradients": {name: gathered(tensor) for name, tensor in optimizer.reduced_gradients().items()},
        "norms": norms,
        "owned": {name: tensor.to_local().numel() for name, tensor in state.items()},
    }


def merged(ranks: list[dict[str, Any]], part: str) -> dict[str, Tensor]:
    """The global tensors of all ranks; copies on several ranks must be bit-equal."""
    whole: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor in rank[part].items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"copies of {name} differ"
    return whole


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in CASES[::3])],
    ids=str,
)
def test_stages_that_several_ranks_hold_train_as_in_one_process(pool: Pool, case: Case, dtype: torch.dtype) -> None:
    alone = pool.run(trained, 1, case.alone, exact_gradients, 3, dtype)[0]
    ranks = pool.run(trained, case.world, case, exact_gradients, 3, dtype)
    for part in ("published", "state", "gradients"):
        found = merged(ranks, part)
        assert found.keys() == alone[part].keys()
        assert [name for name in found if not torch.equal(found[name], alone[part][name])] == []
    assert len({tuple(rank["norms"]) for rank in ranks}) == 1
    assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-14)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_copies_are_bit_equal_after_20_steps_of_rounded_sums(pool: Pool, case: Case) -> None:
    ranks = pool.run(trained, case.world, case, rounded_gradients, 20, torch.bfloat16)
    published = merged(ranks, "published")
    assert published.keys() == case.shapes.keys()
    holders = {name: sum(name in rank["published"] for rank in ranks) for name in published}
    assert holders["embedding"] == len(case.embedding) * case.world // case.pp
    assert all(
        (tensor.float() - initial(name, case.shapes[name])).abs().max() > 0.01 for name, tensor in published.items()
    )


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_copies_cost_no_further_optimizer_state(pool: Pool, case: Case) -> None:
    """Rows of each state have one owner in the grid, however many ranks hold the parameter."""
    owned: dict[str, int] = {}
    for rank in pool.run(trained, case.world, case, exact_gradients, 0, torch.float32):
        for name, count in rank["owned"].items():
            owned[name] = owned.get(name, 0) + count
    shapes = case.shapes.items()
    fields = ("weights", "exp_avg", "exp_avg_sq")
    assert owned == {f"{field}.{name}": math.prod(shape) for field in fields for name, shape in shapes}


def _shard_elements(worker: Worker, case: Case) -> int:
    part = Part(case, case.groups())
    # Rows that the ranks divide, so that no padding is counted.
    matrix = [
        LocalParameter(nn.Parameter(torch.empty(16, 4)), (item.names[0],), holders=item.holders)
        for item in part.parameters
    ]
    optimizer = ShardedOptimizer(matrix, part.groups, optim())
    return sum(tensor.to_local().untyped_storage().nbytes() for tensor in [*optimizer.state().values()][:1])


def test_a_mirrored_rank_stores_half_of_two_stages(pool: Pool) -> None:
    both = pool.run(_shard_elements, 4, mirrored(4, 4, 1))
    one = pool.run(_shard_elements, 4, Case(4, 4, 1, ((0,), (1,), (2,), (3,)), (0,)))
    assert both[1] == one[1] == 4 * 16 * 4 * 4  # four matrices of FP32, or eight by halves


def _norm_of_ones(worker: Worker, case: Case) -> float:
    part = Part(case, case.groups())
    optimizer = ShardedOptimizer(part.parameters, part.groups, optim())
    optimizer.begin_step(part.expected())
    part.backward(lambda name, micro_batch: torch.full(case.shapes[name], 1 / MICRO_BATCHES))
    return optimizer.reduce_gradients()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_have_the_norm_of_the_parameter_count(pool: Pool, case: Case) -> None:
    count = sum(map(math.prod, case.shapes.values()))
    for norm in pool.run(_norm_of_ones, case.world, case):
        assert norm == pytest.approx(count**0.5, rel=1e-12)


def _used_by_two_chunks(worker: Worker) -> tuple[Tensor, int]:
    """Sum and early reductions of an embedding that first and last stage share on one rank, each with its graph."""
    groups = Groups.create(Layout(2, 2), "cpu", holders=[(0, 1)])
    embedding = nn.Parameter(torch.zeros(5, 3))
    optimizer = ShardedOptimizer([LocalParameter(embedding, ("embedding",), holders=(0, 1))], groups, optim())
    optimizer.begin_step({embedding: 2})
    for chunk in range(2):
        (embedding * (1 + chunk + 10 * worker.rank)).sum().backward()
    early = optimizer.launched_early
    optimizer.reduce_gradients()
    return gathered(optimizer.reduced_gradients()["embedding"]), early


def test_a_parameter_of_two_chunks_is_listed_once_and_sums_both(pool: Pool) -> None:
    for total, early in pool.run(_used_by_two_chunks, 2):
        assert torch.equal(total, torch.full((5, 3), 1.0 + 2 + 11 + 12))
        assert early == 1


def _listed_twice(worker: Worker) -> None:
    weight = nn.Parameter(torch.zeros(5, 3))
    ShardedOptimizer(
        [LocalParameter(weight, ("first",)), LocalParameter(weight, ("last",))],
        Groups.create(Layout(1), "cpu"),
        optim(),
    )


def test_a_parameter_that_is_listed_twice_is_refused(pool: Pool) -> None:
    with pytest.raises(RankFailure, match="last is listed twice"):
        pool.run(_listed_twice, 1)


def _disagreeing(worker: Worker, case: Case, change: str) -> str:
    """Error of each rank when the last rank lists its parameters differently."""
    part = Part(case, case.groups())
    if worker.rank == worker.world_size - 1:
        if change == "order":
            part.parameters.reverse()
        else:
            part.parameters.pop(0)
    with pytest.raises(AssertionError) as refused:
        ShardedOptimizer(part.parameters, part.groups, optim())
    return str(refused.value)


@pytest.mark.parametrize("change", ["order", "one less"])
def test_replicas_that_list_different_parameters_are_refused(pool: Pool, change: str) -> None:
    said = pool.run(_disagreeing, 2, mirrored(2, 2, 1), change)
    assert said[0].startswith("dp of pipeline ranks (0, 1): here (('embedding',), (9, 4), True, 0), on rank 1 ((")
    assert said[1].endswith("on rank 0 (('embedding',), (9, 4), True, 0)")


def _one_lacks_the_shared_one(worker: Worker) -> str:
    """Error of each rank when rank 3 lacks the embedding: rank 0 must not wait for it for ever."""
    case = plain(4, 4, 1)
    part = Part(case, case.groups())
    local_parameters = [item for item in part.parameters if worker.rank != 3 or item.names != ("embedding",)]
    try:
        ShardedOptimizer(local_parameters, part.groups, optim())
    except AssertionError as refused:
        return str(refused)
    return ""


def test_a_holder_that_lacks_the_parameter_is_named(pool: Pool) -> None:
    said = pool.run(_one_lacks_the_shared_one, 4)
    assert said[1:3] == ["", ""]
    assert said[0].endswith("on rank 3 None") and "embedding" in said[0]
    assert "here None, on rank 0" in said[3]


def _released(worker: Worker) -> list[bool]:
    groups = Groups.create(Layout(1), "cpu")
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = ShardedOptimizer([LocalParameter(weight, ("w",))], groups, optim())
    gc.collect()
    gc.disable()
    gone = weakref.ref(optimizer)
    del optimizer
    weight.sum().backward()
    released = [gone() is None, weight.grad is not None]
    gc.enable()
    return released


def test_hooks_do_not_keep_an_optimizer_alive(pool: Pool) -> None:
    assert pool.run(_released, 1) == [[True, True]]
