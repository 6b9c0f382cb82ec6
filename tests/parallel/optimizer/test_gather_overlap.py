"""New weights that are gathered during the next forward: the same bits as gathered before it, and never old weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.comm.errors import CommunicationError
from counterflow.local_parameter import LocalParameter
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer import bucket
from counterflow.parallel.optimizer.collectives import Collective
from counterflow.parallel.optimizer.sharded import ShardedOptimizer
from counterflow.tests.parallel.seen import Launch, recorded
from counterflow.tests.parallel.staged import CASES, Case, Part, initial, mirrored, rounded_gradients
from counterflow.tests.pool import Pool, Worker

STEPS = 3


def optim(elements: int, **keys: Any) -> OptimConfig:
    """Configuration with buckets that close at this number of elements."""
    return OptimConfig.model_validate({"lr": 1e-2, "moments": "fp32", "bucket_mb": elements * 4 / 2**20, **keys})


def _both_ways(worker: Worker, case: Case, dtype: torch.dtype) -> dict[bool, dict[str, Any]]:
    """Train with blocking and with overlapped gathers; returns what each forward reads, parameter by parameter."""
    groups, runs = case.groups(), {}
    for blocking in (True, False):
        part = Part(case, groups, dtype)
        optimizer = ShardedOptimizer(part.parameters, groups, optim(1))
        optimizer.initialise(initial)
        read: list[Tensor] = []
        with recorded() as seen:
            for step in range(STEPS):
                optimizer.begin_step(part.expected())
                for item in part.parameters:
                    optimizer.wait_for(item.parameter)
                    read.append(item.parameter.detach().clone())
                part.backward(rounded_gradients(case, step))
                optimizer.step(1e-2, optimizer.reduce_gradients(), blocking)
        state = {name: tensor.to_local().clone() for name, tensor in optimizer.state().items()}
        runs[blocking] = {"read": read, "state": state, "published": part.published(), "launches": seen.launches}
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_overlapped_gathers_bring_what_blocking_ones_bring(pool: Pool, case: Case, dtype: torch.dtype) -> None:
    ranks = pool.run(_both_ways, case.world, case, dtype)
    for rank in ranks:
        blocking, overlapped = rank[True], rank[False]
        assert all(map(torch.equal, blocking["read"], overlapped["read"])), "NaN equals nothing"
        assert blocking["launches"] == overlapped["launches"]
        for part in ("state", "published"):
            assert [
                name for name in blocking[part] if not torch.equal(blocking[part][name], overlapped[part][name])
            ] == []
    launches: list[list[Launch]] = [rank[False]["launches"] for rank in ranks]
    for group in {launch.ranks for of_rank in launches for launch in of_rank}:
        orders = {tuple(launch for launch in launches[rank] if launch.ranks == group) for rank in group}
        assert len(orders) == 1, f"the members of {group} begin its collectives in different orders"


class Layers:
    """Four layers on two ranks, each a bucket."""

    def __init__(self, **keys: Any) -> None:
        self.groups = Groups.create(Layout(2), "cpu", timeout=keys.pop("timeout", 60.0))
        self.layers = [nn.Parameter(torch.empty(6, 4)) for _ in range(4)]
        local_parameters = [LocalParameter(layer, (f"layers.{i}",)) for i, layer in enumerate(self.layers)]
        self.optimizer = ShardedOptimizer(local_parameters, self.groups, optim(1, **keys))
        self.optimizer.initialise(initial)

    def step(self, blocking: bool = False) -> None:
        self.optimizer.begin_step(dict.fromkeys(self.layers, 1))
        for layer in reversed(self.layers):
            self.optimizer.wait_for(layer)
            (layer * 2).sum().backward()
        self.optimizer.step(1e-2, self.optimizer.reduce_gradients(), blocking)

    def missing(self) -> list[int]:
        """Layers without weights: a layer has arrived as a whole or not at all."""
        missing = [bool(layer.isnan().all()) for layer in self.layers]
        assert missing == [bool(layer.isnan().any()) for layer in self.layers]
        return [number for number, is_missing in enumerate(missing) if is_missing]


def _waiting_for_one(worker: Worker) -> list[Any]:
    model = Layers()
    versions = [layer._version for layer in model.layers]
    model.step()
    found: list[Any] = [model.missing()]
    model.optimizer.wait_for(nn.ParameterList([model.layers[2]]), model.layers[1])
    found.append(model.missing())
    with pytest.raises(AssertionError) as refused:
        model.layers[3].sum().backward()
    found.append(str(refused.value))
    model.optimizer.finish_gathers()
    assert all(layer._version > before for layer, before in zip(model.layers, versions, strict=True))
    written = [layer._version for layer in model.layers]
    model.optimizer.wait_for(*model.layers)
    assert written == [layer._version for layer in model.layers], "nothing is written twice"
    return [*found, model.missing()]


def test_a_weight_in_flight_is_nan_and_takes_no_gradient(pool: Pool) -> None:
    refused = "layers.3 was used before its new weights had arrived"
    assert pool.run(_waiting_for_one, 2) == [[[0, 1, 2, 3], [0, 3], refused, []]] * 2


def _averaged(optimizer: ShardedOptimizer) -> None:
    with optimizer.averaged():
        pass


TOUCHING: dict[str, Callable[[ShardedOptimizer], Any]] = {
    "finish_gathers": lambda optimizer: optimizer.finish_gathers(),
    "state": lambda optimizer: optimizer.state(),
    "publish": lambda optimizer: optimizer.publish(),
    "averaged": _averaged,
    "initialise": lambda optimizer: optimizer.initialise(initial),
    "reduce_gradients": lambda optimizer: optimizer.reduce_gradients(),
    "step": lambda optimizer: optimizer.step(0.0, 1.0),
}


def _touched(worker: Worker, name: str) -> tuple[list[int], list[int], bool]:
    model = Layers(ema_decay=0.5)
    model.step()
    before = model.missing()
    TOUCHING[name](model.optimizer)
    if name == "initialise":
        expected = [initial(f"layers.{i}", (6, 4)) for i in range(4)]
    else:
        other = Layers(ema_decay=0.5)
        other.step(blocking=True)
        expected = [layer.detach() for layer in other.layers]
    return before, model.missing(), all(map(torch.equal, model.layers, expected))


@pytest.mark.parametrize("name", TOUCHING)
def test_every_use_of_weights_or_state_waits_first(pool: Pool, name: str) -> None:
    assert pool.run(_touched, 2, name) == [([0, 1, 2, 3], [], True)] * 2


def _late(number: int, wait: Callable[[], None]) -> Any:
    """Replacement for `begin_all_gather` that waits before launch `number`."""
    begin, launched = bucket.begin_all_gather, iter(range(1000))

    def begin_all_gather(shard: Tensor, group: dist.ProcessGroup, meter: Any) -> Collective:
        if next(launched) == number:
            wait()
        return begin(shard, group, meter)

    return patch.object(bucket, "begin_all_gather", begin_all_gather)


def _used_before_the_last_is_launched(worker: Worker) -> list[list[int]]:
    """Let rank 1 begin to gather layer 3 only once rank 0 has the others."""
    model, token = Layers(), torch.ones(1)
    if worker.rank == 1:
        with _late(3, lambda: dist.recv(token, 0, group=model.groups.world)):
            model.step()
        return []
    model.step()
    found = []
    for layer in model.layers[:3]:
        model.optimizer.wait_for(layer)
        found.append(model.missing())
    dist.send(token, 1, group=model.groups.world)
    model.optimizer.wait_for(model.layers[3])
    return [*found, model.missing()]


def test_layers_can_be_used_before_the_last_gather_could_have_ended(pool: Pool) -> None:
    assert pool.run(_used_before_the_last_is_launched, 2)[0] == [[1, 2, 3], [2, 3], [3], []]


def _with_a_dead_peer(worker: Worker) -> tuple[str, list[int]]:
    """Error and missing layers on rank 0, while rank 1 gathers nothing."""
    model = Layers(timeout=5.0)
    if worker.rank == 1:
        with patch.object(bucket, "begin_all_gather", side_effect=RuntimeError("gone")), pytest.raises(RuntimeError):
            model.step()
        return "", []
    model.step()
    with pytest.raises(CommunicationError) as refused:
        model.optimizer.wait_for(model.layers[1])
    return str(refused.value), model.missing()


def test_a_dead_peer_is_reported_and_leaves_no_old_weights(pool: Pool) -> None:
    said, missing = pool.run(_with_a_dead_peer, 2)[0]
    assert said.startswith("the all-gather of weights over ranks 0, 1 failed: ")
    assert missing == [0, 1, 2, 3]


def _groups_used(worker: Worker, case: Case) -> list[tuple[tuple[str, ...], tuple[int, ...], list[Launch]]]:
    """Names in each bucket, pipeline ranks that hold them, and the launches for it alone in a step."""
    part = Part(case, case.groups())
    optimizer = ShardedOptimizer(part.parameters, part.groups, optim(1))
    optimizer.initialise(initial)
    found = []
    optimizer.begin_step(part.expected())
    for item in reversed(part.parameters):
        with recorded() as seen:
            part.backward(rounded_gradients(case, 0), [item])
        found.append((item.names, item.holders, seen.launches))
    optimizer.step(1e-2, optimizer.reduce_gradients())
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.ep > 1] + [mirrored(8, 2, 1)], ids=str)
def test_gradients_go_to_the_holders_of_the_same_parameter_alone(pool: Pool, case: Case) -> None:
    ranks = pool.run(_groups_used, case.world, case)
    edp = case.world // (case.pp * case.ep)
    for rank, parts in enumerate(ranks):
        for names, holders, launches in parts:
            # Ranks count ep fastest, then edp, then pp.
            everyone = [(pp * edp + at) * case.ep + ep for pp in holders for at in range(edp) for ep in range(case.ep)]
            same = [other for other in everyone if other % case.ep == rank % case.ep]
            expected = tuple(sorted(same if "experts" in names[0] else everyone))
            assert [launch.ranks for launch in launches] == ([expected] if len(expected) > 1 else []), names


def _written_on_arrival(worker: Worker) -> list[list[int]]:
    """Layers without weights after waits for the first layer alone, while a GPU says that some gathers have ended."""
    model, found = Layers(), []
    model.step()
    ended: set[int] = set()
    number = {id(b._gathering): index for index, b in enumerate(model.optimizer._buckets)}
    with patch.object(Collective, "done", property(lambda collective: number[id(collective)] in ended)):
        for now in ([], [3], [1], [2]):
            ended.update(now)
            model.optimizer.wait_for(model.layers[0])
            found.append(model.missing())
    return found


def test_weights_that_have_arrived_are_written_in_their_order_at_the_next_wait(pool: Pool) -> None:
    assert pool.run(_written_on_arrival, 2) == [[[1, 2, 3], [1, 2, 3], [2, 3], []]] * 2
