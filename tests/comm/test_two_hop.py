"""Two-hop dispatch against flat dispatch, on many kinds of nodes, and the times of its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.hops import InFlight
from counterflow.comm.nodes import Nodes
from counterflow.comm.one_process import OneProcessDispatcher
from counterflow.comm.routed import DispatchOptions
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire, PlainWire
from counterflow.tests.comm.layer import (
    Case,
    assert_close_to_dense,
    count_launches,
    dense_reference,
    make_case,
    outputs_and_gradients,
    recorded_all_to_alls,
    run_experts,
)
from counterflow.tests.comm.routings import random_routing
from counterflow.tests.pool import Pool, Worker

FOUR = [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 1], [3, 7, 7, 7], [0, 1, 1, 2]]
"""Nodes of four ranks: even, one rank each, one node, uneven, with arbitrary numbers."""
SUMS = ("out", "x")
"""Tensors that are added up in another order; all others are copied."""


def _compare(worker: Worker, seeds: range) -> None:
    for seed in seeds:
        case = random_routing(seed, worker.world_size)
        experts, alignment = len(case.up), 1 + 3 * (seed % 2)
        nodes = FOUR[seed % len(FOUR)]
        flat = FlatDispatcher(dist.group.WORLD, experts, DispatchOptions(alignment))
        hops = TwoHopDispatcher(dist.group.WORLD, experts, DispatchOptions(alignment), nodes)
        expected = outputs_and_gradients(case, worker.rank, worker.world_size, flat)
        found = outputs_and_gradients(case, worker.rank, worker.world_size, hops)
        for name, value in expected.items():
            if name not in SUMS:
                assert torch.equal(found[name], value), f"routing {seed}: {name}"
        assert_close_to_dense(found, {name: expected[name].double() for name in SUMS}, 1e-6, f"routing {seed}")


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 4))])
def test_two_hops_equal_flat_for_200_random_routings(part: int, pool: Pool) -> None:
    pool.run(_compare, 4, range(50 * part, 50 * part + 50))


def test_rows_arrive_as_flat_sorts_them(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for seed in range(20):
            case = random_routing(seed, 4)
            given = case.x[worker.rank], case.expert_ids[worker.rank], case.weights[worker.rank]
            flat = FlatDispatcher(dist.group.WORLD, len(case.up), DispatchOptions(4)).dispatch(*given)
            two_hop = TwoHopDispatcher(dist.group.WORLD, len(case.up), DispatchOptions(4), FOUR[seed % 6])
            hops = two_hop.dispatch(*given)
            assert torch.equal(hops.x, flat.x) and torch.equal(hops.weights, flat.weights), seed
            assert torch.equal(hops.offsets, flat.offsets) and hops.tokens_per_expert == flat.tokens_per_expert, seed

    pool.run(compare, 4)


@pytest.mark.parametrize("nodes", [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_two_hops_equal_the_dense_layer_on_eight_ranks(nodes: list[int], pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for seed in range(10):
            case = random_routing(seed, 8)
            hops = TwoHopDispatcher(dist.group.WORLD, len(case.up), nodes=nodes)
            found = outputs_and_gradients(case, worker.rank, 8, hops)
            assert_close_to_dense(found, dense_reference(case, worker.rank, 8), 1e-6, f"routing {seed}")

    pool.run(compare, 8)


def _one_process(case: Case, dtype: torch.dtype) -> Case:
    def whole(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts)]

    grads = [part.to(dtype) for part in case.grads]
    return Case([part.to(dtype) for part in whole(case.x)], whole(case.expert_ids), whole(case.weights),
                case.up.to(dtype), case.down.to(dtype), whole(grads))  # fmt: skip


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_that_rounds_partial_sums_has_the_same_bits(dtype: torch.dtype, fp8: bool, pool: Pool) -> None:
    """Dispatch and combine of scaled copies of rows, without matrix products, which would round differently."""

    def round_trip(worker: Worker, one_process: bool) -> list[tuple[Tensor, Tensor]]:
        found = []
        for seed in range(0, 40, 3):
            case = random_routing(seed, 4, dtype)
            nodes, options = FOUR[seed % len(FOUR)], DispatchOptions(wire=FP8Wire() if fp8 else PlainWire())
            if one_process:
                case = _one_process(case, dtype)
            x = case.x[worker.rank].clone().requires_grad_()
            dispatcher = (
                OneProcessDispatcher(len(case.up), nodes, options)
                if one_process
                else TwoHopDispatcher(dist.group.WORLD, len(case.up), options, nodes)
            )
            dispatched = dispatcher.dispatch(x, case.expert_ids[worker.rank], case.weights[worker.rank])
            y = (dispatched.x.float() * dispatched.weights[:, None]).to(dtype)
            out = dispatcher.combine(y, dispatched)
            out.backward(case.grads[worker.rank])
            assert x.grad is not None
            found.append((out.detach(), x.grad))
        return found

    (one,) = pool.run(round_trip, 1, True)
    many = pool.run(round_trip, 4, False)
    for number, (out, grad) in enumerate(one):
        assert torch.equal(torch.cat([rank[number][0] for rank in many]), out), number
        assert torch.equal(torch.cat([rank[number][1] for rank in many]), grad), number


def test_partial_sums_are_rounded_where_they_are_sent() -> None:
    """Three experts on two nodes: 1 + 2^-8 + 2^-8 is 1 if BF16 rounds after each addition, and 1 + 2^-7 if the small
    terms are added first; the fixed order is ranks of a node, then nodes."""
    ids, weights = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    values = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    for nodes, expected in (([0, 0, 1], 1.0), ([0, 1, 1], 1.0 + 2.0**-7)):
        dispatcher = OneProcessDispatcher(3, nodes)
        dispatched = dispatcher.dispatch(torch.zeros(1, 1, dtype=torch.bfloat16), ids, weights)
        assert dispatcher.combine(values, dispatched).item() == expected, nodes


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_rows_of_an_odd_width_are_sent(tokens: int) -> None:
    """In BF16 the gate weights then begin at an address that is not a multiple of 4, and a single row is contiguous."""
    x, ids = torch.randn(tokens, 3).bfloat16(), torch.tensor([[2, 0]]).expand(tokens, 2)
    weights = torch.rand(tokens, 2)
    flat, hops = (made.dispatch(x, ids, weights) for made in (FlatDispatcher(None, 4), TwoHopDispatcher(None, 4)))
    assert torch.equal(hops.x, flat.x) and torch.equal(hops.weights, flat.weights)


def test_there_may_be_more_experts_than_16_bits_count() -> None:
    ids, weights = torch.tensor([[39_999, 35_000]]), torch.tensor([[0.25, 0.75]])
    dispatched = TwoHopDispatcher(None, 40_000).dispatch(torch.ones(1, 4), ids, weights)
    assert dispatched.weights.tolist() == [0.75, 0.25], "by expert"


def test_a_hop_is_launched_when_enough_phases_have_passed(pool: Pool) -> None:
    def watch(worker: Worker) -> list[int]:
        in_flight = InFlight()
        case = make_case(0, [5, 9, 2, 7], 8, 2, torch.float32)
        dispatcher = TwoHopDispatcher(dist.group.WORLD, 8, DispatchOptions(in_flight=in_flight), [0, 0, 1, 1])
        x = case.x[worker.rank].requires_grad_()
        with recorded_all_to_alls() as events:
            launched = []

            def phases(count: int) -> None:
                for _ in range(count):
                    launched.append(count_launches(events))
                    in_flight.boundary()
                launched.append(count_launches(events))

            pending = dispatcher.begin_dispatch(x, case.expert_ids[worker.rank], case.weights[worker.rank])
            phases(4)  # counts, first hop; the second after two phases more
            dispatched = pending.wait()
            returning = dispatcher.begin_combine(run_experts(dispatched, *_local(case, worker)), dispatched)
            phases(3)  # on the way back, the second after one
            out = returning.wait()
            launched.append(count_launches(events))
            out.sum().backward()  # without boundaries, each waits for its two hops
            launched.append(count_launches(events))
        return launched

    assert pool.run(watch, 4) == [[2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 9]] * 4


def _local(case: Case, worker: Worker) -> tuple[Tensor, Tensor]:
    per_rank = len(case.up) // worker.world_size
    here = slice(worker.rank * per_rank, (worker.rank + 1) * per_rank)
    return case.up[here], case.down[here]


class HostWaits(TorchDispatchMode):
    """Record of operations that would make the host wait for a GPU: numbers read from or copied to the GPU at once,
    and results whose size depends on data."""

    WAITS = ("_local_scalar_dense", "nonzero.", "masked_select", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        # On a CPU these functions read and write memory without a dispatch that could be recorded.
        self._patches = (
            mock.patch.object(torch.Tensor, "tolist", self._to_list(torch.Tensor.tolist)),
            mock.patch.object(torch, "tensor", self._to_device(torch.tensor)),
        )

    def _to_list(self, original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def to_list(tensor: Tensor) -> Any:
            self.seen.append("tolist")
            return original(tensor)

        return to_list

    def _to_device(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def tensor(data: Any, **how: Any) -> Tensor:
            if "device" in how:
                self.seen.append("torch.tensor")
            return original(data, **how)

        return tensor

    def __enter__(self) -> HostWaits:
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        kwargs = kwargs or {}
        waits = name.startswith(self.WAITS)
        if name.startswith("repeat_interleave"):
            waits = kwargs.get("output_size") is None
        if waits:
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("alignment", [1, 16])
def test_the_host_waits_for_the_counts_alone(alignment: int, pool: Pool) -> None:
    def count(worker: Worker) -> list[list[str]]:
        found = []
        for dispatcher in (
            FlatDispatcher(dist.group.WORLD, 8, DispatchOptions(alignment)),
            TwoHopDispatcher(dist.group.WORLD, 8, DispatchOptions(alignment), [0, 0, 1, 1]),
        ):
            case = random_routing(20, 4)
            x, weights = case.x[worker.rank].requires_grad_(), case.weights[worker.rank].requires_grad_()
            ids = case.expert_ids[worker.rank] % 8
            ids = ids[:, :1]  # one choice each, so that no expert occurs twice
            with HostWaits() as waits:
                dispatched = dispatcher.dispatch(x, ids, weights[:, :1])
                dispatcher.combine(2 * dispatched.x, dispatched).sum().backward()
            found.append(waits.seen)
        return found

    assert pool.run(count, 4) == [[["tolist"]] * 2] * 4


def test_relays_have_the_senders_local_index() -> None:
    nodes = Nodes.make([4, 4, 4, 5, 5, 9, 9, 9, 9])
    assert nodes.of == (0, 0, 0, 1, 1, 2, 2, 2, 2)
    assert [nodes.relay(2, node) for node in range(3)] == [2, 3, 7]  # the second node has only two ranks
    assert [nodes.relay(8, node) for node in range(3)] == [0, 4, 8]
    for rank in range(9):
        assert nodes.relay(rank, nodes.of[rank]) == rank
    for node in range(3):
        clients = [source for relay in nodes.members(node) for source in nodes.clients(relay)]
        assert sorted(clients) == list(range(9)), "every rank has one relay on every node"
