"""DeepEP adapter against the flat and the two-hop dispatcher, with a stand-in for the library."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.deepep import adapter
from counterflow.comm.deepep.adapter import DeepEPDispatcher
from counterflow.comm.deepep.buffers import open_buffer
from counterflow.comm.deepep.library import Generation, Job
from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.meter import Meter, Traffic
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire, PlainWire
from counterflow.settings import UsageError
from counterflow.tests.comm.deepep_parts import CALLS, Settings
from counterflow.tests.comm.deepep_stand_in import stand_in
from counterflow.tests.comm.layer import (
    Case,
    assert_close_to_dense,
    dense_reference,
    outputs_and_gradients,
    run_experts,
)
from counterflow.tests.comm.routings import TOKENS, random_routing
from counterflow.tests.comm.test_two_hop import HostWaits
from counterflow.tests.pool import Pool, Worker

HIDDEN, INNER = 256, 4  # the smallest rows that the library's kernels sum
GENERATIONS: tuple[Generation, ...] = ("legacy", "elastic")


def dispatcher(
    generation: Generation,
    experts: int,
    peers: int,
    options: DispatchOptions | None = None,
    settings: Settings | None = None,
) -> DeepEPDispatcher:
    """Dispatcher over the whole world, on nodes of `peers` ranks; rows may be FP32, which stands for BF16."""
    library = stand_in(settings or Settings(peers=peers, float32=True))
    group: Any = dist.group.WORLD
    nodes = [rank // peers for rank in range(group.size())]
    job = Job(nodes, HIDDEN, experts, 4 * TOKENS, fp8=options is not None and isinstance(options.wire, FP8Wire))
    buffer = open_buffer(library, group, job, generation)
    return DeepEPDispatcher(group, experts, options, buffer=buffer, nodes=nodes)


def two_hop(experts: int, peers: int, options: DispatchOptions | None = None) -> TwoHopDispatcher:
    group: Any = dist.group.WORLD
    nodes = [rank // peers for rank in range(group.size())]
    return TwoHopDispatcher(group, experts, options, nodes)


def routings(seeds: range, ranks: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Case]]:
    for seed in seeds:
        yield f"routing {seed}", random_routing(seed, ranks, dtype, HIDDEN, INNER)


class OnePerSize:
    """Dispatchers by number of experts, each made once."""

    def __init__(self, make: Any) -> None:
        self._make, self._made = make, dict[int, RoutedDispatcher]()

    def __getitem__(self, experts: int) -> RoutedDispatcher:
        if experts not in self._made:
            self._made[experts] = self._make(experts)
        return self._made[experts]


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def _compare(worker: Worker, peers: int, seeds: range) -> None:
    rank, size = worker.rank, worker.world_size
    flat = OnePerSize(lambda experts: FlatDispatcher(dist.group.WORLD, experts))
    hops = OnePerSize(lambda experts: two_hop(experts, peers))
    by_generation = {
        made: OnePerSize(lambda experts, made=made: dispatcher(made, experts, peers)) for made in GENERATIONS
    }
    for name, case in routings(seeds, size):
        experts = len(case.up)
        expected, by_node = (outputs_and_gradients(case, rank, size, made[experts]) for made in (flat, hops))
        assert_close_to_dense(expected, dense_reference(case, rank, size), 1e-5, name)  # products are FP32, not FP64
        for generation, made in by_generation.items():
            found = outputs_and_gradients(case, rank, size, made[experts])
            assert_close_to_dense(found, expected, 1e-6, f"{generation}, {name}")
            # Sums in the same order have the same bits: the legacy generation adds ranks and then nodes, as two-hop
            # does, the elastic one adds by a token's slots.
            other_bits = differing(found, by_node)
            allowed = {"out", "x"} if generation == "elastic" else set()
            assert set(other_bits) <= allowed, f"{generation}, {name}: {other_bits}"


def test_fused_kernels_have_the_bits_of_plain_operations(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for seed, alignment, fp8 in itertools.product(range(0, 20, 4), (1, 4), (False, True)):
            case = random_routing(seed, 4, torch.bfloat16 if fp8 else torch.float32, HIDDEN, INNER)
            for generation in GENERATIONS:
                found = []
                for active in (False, True):
                    with mock.patch.object(adapter, "takes_fused_kernels", return_value=active):
                        options = DispatchOptions(alignment, FP8Wire() if fp8 else PlainWire())
                        made = dispatcher(generation, len(case.up), 2, options)
                        found.append(outputs_and_gradients(case, worker.rank, 4, made))
                        made.close()
                assert differing(*found) == [], (seed, alignment, fp8, generation)

    pool.run(compare, 4)


# 200 routings; any twenty consecutive ones have every special case.
LAYOUTS = [
    (4, 2, range(20)),
    pytest.param(4, 2, range(20, 60), marks=pytest.mark.long),
    (2, 1, range(60, 80)),
    pytest.param(2, 1, range(80, 140), marks=pytest.mark.long),
    (4, 4, range(140, 160)),
    (8, 2, range(160, 180)),
    pytest.param(8, 4, range(180, 200), marks=pytest.mark.long),
]


@pytest.mark.parametrize(("ranks", "peers", "seeds"), LAYOUTS, ids=lambda value: str(value))
def test_both_generations_equal_flat_and_two_hop(pool: Pool, ranks: int, peers: int, seeds: range) -> None:
    pool.run(_compare, ranks, peers, seeds)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("release", ["1.2.1", "2.1.0"])
def test_in_bf16_and_fp8_the_bits_are_two_hops_and_experts_get_the_codes(pool: Pool, fp8: bool, release: str) -> None:
    def compare(worker: Worker) -> None:
        for name, case in routings(range(20), 4, torch.bfloat16):
            experts = len(case.up)
            options = [DispatchOptions(16, FP8Wire() if fp8 else PlainWire()) for _ in range(2)]
            settings = Settings(release=release, peers=2)  # without float32, so FP32 is refused
            tested = dispatcher("legacy", experts, 2, options[0], settings)
            reference = two_hop(experts, 2, options[1])
            arrived: list[Any] = []

            def layer(made: RoutedDispatcher, x: Tensor, ids: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
                dispatched = made.dispatch(x, ids, weights)
                arrived.append(dispatched)  # noqa: B023
                return made.combine(run_experts(dispatched, *rest), dispatched)

            expected = outputs_and_gradients(case, worker.rank, 4, reference, layer)
            assert differing(outputs_and_gradients(case, worker.rank, 4, tested, layer), expected) == [], name
            wanted, found = arrived
            assert torch.equal(found.offsets, wanted.offsets) and found.tokens_per_expert == wanted.tokens_per_expert
            for actual, codes in ((found.codes, wanted.codes), (found.incoming.take(), wanted.incoming.take())):
                assert (actual is None) == (codes is None) == (not fp8)
                if fp8:
                    assert torch.equal(actual.data.view(torch.uint8), codes.data.view(torch.uint8))
                    assert torch.equal(actual.scale, codes.scale)
            if fp8:
                assert torch.equal(found.codes.dequantize(torch.bfloat16), found.x)

    pool.run(compare, 4)


def test_elastic_sends_fp8_in_both_directions(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for name, case in routings(range(20), 4, torch.bfloat16):
            experts = len(case.up)
            tested = dispatcher("elastic", experts, 2, DispatchOptions(16, FP8Wire()), Settings(peers=2))
            found = outputs_and_gradients(case, worker.rank, 4, tested)
            reference = two_hop(experts, 2, DispatchOptions(16, FP8Wire()))
            expected = outputs_and_gradients(case, worker.rank, 4, reference)
            assert set(differing(found, expected)) <= {"out", "x"}, name
            # Sums of BF16 partial sums in another order.
            assert_close_to_dense(found, {key: value.double() for key, value in expected.items()}, 2e-2, name)

    pool.run(compare, 4)


CALLS_OF_A_LAYER = {
    "legacy": {
        "Buffer.get_dispatch_layout": 1,
        "Buffer.dispatch": 2,
        "Buffer.combine": 2,
        "EventOverlap.current_stream_wait": 4,
    },
    "elastic": {"ElasticBuffer.dispatch": 2, "ElasticBuffer.combine": 2, "EventOverlap.current_stream_wait": 4},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_layer_is_four_calls_each_waited_for_when_its_result_is_needed(pool: Pool, generation: Generation) -> None:
    def count(worker: Worker) -> tuple[list[int], dict[str, int]]:
        case = random_routing(0, 2, torch.float32, HIDDEN, INNER)
        made = dispatcher(generation, len(case.up), 2)
        waits: list[int] = []

        def waited(*_: Tensor) -> None:
            waits.append(CALLS["EventOverlap.current_stream_wait"])

        def layer(made: RoutedDispatcher, x: Tensor, ids: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
            waited()
            pending = made.begin_dispatch(x, ids, weights, made.begin_route(ids))
            waited()
            dispatched = pending.wait()
            waited()
            pending_sum = made.begin_combine(run_experts(dispatched, *rest), dispatched)
            waited()
            return pending_sum.wait()

        before = Counter(CALLS)
        outputs_and_gradients(case, worker.rank, 2, made, layer)
        return waits, dict(CALLS - before)

    for waits, calls in pool.run(count, 2):
        assert [wait - waits[0] for wait in waits] == [0, 0, 1, 1]
        assert calls == CALLS_OF_A_LAYER[generation]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("wanted", ["x", "weights"])
def test_only_the_gradients_that_are_needed_are_made(pool: Pool, generation: Generation, wanted: str) -> None:
    def compare(worker: Worker) -> None:
        for name, case in routings(range(20), 2):
            found = []
            for made in (dispatcher(generation, len(case.up), 1), two_hop(len(case.up), 1)):
                inputs = {"x": case.x[worker.rank].clone(), "weights": case.weights[worker.rank].clone()}
                inputs[wanted].requires_grad_()
                dispatched = made.dispatch(inputs["x"], case.expert_ids[worker.rank], inputs["weights"])
                out = made.combine(dispatched.x * dispatched.weights[:, None], dispatched)
                out.backward(case.grads[worker.rank])
                assert dispatched.x.requires_grad == (wanted == "x")
                found.append({wanted: inputs[wanted].grad})
            assert_close_to_dense(found[0], found[1], 1e-6, name)

    pool.run(compare, 2)


class Uncounted:
    """Buffer of the library, without a count of the buffer's own waits for the device."""

    def __init__(self, buffer: Any, waits: HostWaits) -> None:
        self._buffer, self._waits = buffer, waits

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            before = len(self._waits.seen)
            result = getattr(self._buffer, name)(*args, **named)
            del self._waits.seen[before:]
            return result

        return call


@pytest.mark.parametrize("generation", GENERATIONS)
def test_outside_the_library_the_host_waits_for_nothing_but_the_meter(pool: Pool, generation: Generation) -> None:
    def count(worker: Worker) -> list[list[str]]:
        found = []
        for meter in (None, Meter([0, 0, 1, 1])):
            case = random_routing(20, 4, torch.bfloat16, HIDDEN, INNER)
            made = dispatcher(generation, len(case.up), 2, DispatchOptions(16, meter=meter))
            x, weights = case.x[worker.rank].requires_grad_(), case.weights[worker.rank].requires_grad_()
            with HostWaits() as waits:
                made.buffer._buffer = Uncounted(made.buffer._buffer, waits)
                dispatched = made.dispatch(x, case.expert_ids[worker.rank], weights)
                made.combine(2 * dispatched.x, dispatched).sum().backward()
            found.append(waits.seen)
        return found

    assert pool.run(count, 4) == [[[], ["tolist"]]] * 4


def test_a_route_keeps_none_of_the_rows(pool: Pool) -> None:
    """Only indices stay between the layer's forward and its backward."""

    def kept(worker: Worker) -> list[bool]:
        case = random_routing(0, 2, torch.float32, HIDDEN, INNER)
        found = []
        for generation in GENERATIONS:
            made = dispatcher(generation, len(case.up), 2)
            ids, weights = case.expert_ids[worker.rank], case.weights[worker.rank]
            dispatched = made.dispatch(case.x[worker.rank].requires_grad_(), ids, weights)
            route = dispatched.handle
            held = [value for value in vars(route).values() if isinstance(value, Tensor)]
            found.append(any(value.dim() == 2 and value.shape[1] == HIDDEN for value in held))
        return found

    assert pool.run(kept, 2) == [[False, False]] * 2


def test_more_tokens_than_the_buffer_was_made_for_are_refused(pool: Pool) -> None:
    def refused(worker: Worker) -> str:
        made = dispatcher("elastic", 4, 2)
        with pytest.raises(UsageError) as fault:
            made.begin_route(torch.zeros(4 * TOKENS + 1, 1, dtype=torch.int64))
        return str(fault.value)

    for message in pool.run(refused, 2):
        assert (
            message
            == f"a rank dispatches {4 * TOKENS + 1} tokens, and DeepEP's buffer was made for {4 * TOKENS} a rank"
        )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_memory_is_freed_once(pool: Pool, generation: Generation) -> None:
    def closed(worker: Worker) -> None:
        made = dispatcher(generation, 4, 2)
        made.buffer.close()
        with pytest.raises(AssertionError, match="it was destroyed"):
            made.dispatch(torch.zeros(3, HIDDEN), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))

    pool.run(closed, 2)


# Traffic


def _bytes(traffic: Traffic) -> dict[tuple[str, str], int]:
    return {(kind.purpose, kind.link): tally.bytes for kind, tally in traffic.items()}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_group_is_counted_to_send_what_two_hop_sends(pool: Pool, generation: Generation, fp8: bool) -> None:
    """Both count a token once per other node, and inside nodes once per rank except the relay. The data sent with a
    token differ: 8 bytes per choice, or 6 filled up to a multiple of 16."""
    seeds, width = 20, 512  # with 512 values, codes and scales fill 16 bytes exactly

    def count(worker: Worker) -> list[tuple[Traffic, Traffic, int]]:
        found = []
        for seed in range(seeds):
            case = random_routing(seed, 4, torch.bfloat16, width, INNER)
            experts, top_k = len(case.up), case.expert_ids[0].shape[1]
            meters = [Meter([0, 0, 1, 1]) for _ in range(2)]
            library = stand_in(Settings(peers=2))
            group: Any = dist.group.WORLD
            buffer = open_buffer(library, group, Job([0, 0, 1, 1], width, top_k, 4 * TOKENS, fp8=fp8), generation)
            options = [DispatchOptions(1, FP8Wire() if fp8 else PlainWire(), meter) for meter in meters]
            tested = DeepEPDispatcher(group, experts, options[0], buffer=buffer, nodes=[0, 0, 1, 1])
            for made in (tested, two_hop(experts, 2, options[1])):
                outputs_and_gradients(case, worker.rank, 4, made)
            found.append((meters[0].take(), meters[1].take(), top_k))
        return found

    counted = pool.run(count, 4)
    row = width + 4 * width // 128 if fp8 else 2 * width
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(seeds):
        found, expected = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for rank in counted:
            found.update(_bytes(rank[seed][0]))
            expected.update(_bytes(rank[seed][1]))
        top_k = counted[0][seed][2]
        for link in ("within", "between"):
            expected.pop(("counts", link), None)
            sent, message = expected.pop(("dispatch", link), 0), -(-(row + 6 * top_k) // 16) * 16
            assert sent % message == 0
            assert found.pop(("dispatch", link), 0) == sent // message * (row + 8 * top_k)
        assert +found == +expected, f"routing {seed}"
        seen.update(found.keys())
    assert set(seen) == {
        (purpose, link)
        for purpose in ("combine", "combine backward", "dispatch backward")
        for link in ("within", "between")
    }
