"""Meter against the tensors that are handed to the collective library, by link, and V3's savings."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.meter import KINDS, Kind, Meter, Tally, Traffic, numbers_of, traffic_of
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire
from counterflow.model.config import ModelConfig
from counterflow.model.router import Router
from counterflow.tests.comm.layer import outputs_and_gradients, recorded_all_to_alls
from counterflow.tests.comm.routings import random_routing
from counterflow.tests.pool import Pool, Worker


def _sent_elsewhere(events: list[tuple[str, tuple[Tensor, Tensor, list[int], int]]]) -> int:
    """Bytes of the recorded tensors that were for other ranks."""
    total = 0
    for name, launched in events:
        if name == "launch":
            sent, _, splits, rank = launched
            total += sent.nbytes - splits[rank] * sent[:1].nbytes
    return total


def test_the_meter_equals_the_tensors_that_were_sent(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        for seed in range(12):
            case, nodes = random_routing(seed, 4), [[0, 0, 1, 1], [0, 1, 2, 2]][seed % 2]
            meter = Meter(dict(enumerate(nodes)))
            flat = FlatDispatcher(dist.group.WORLD, len(case.up), DispatchOptions(meter=meter))
            options = DispatchOptions(wire=FP8Wire(), meter=meter)
            hops = TwoHopDispatcher(dist.group.WORLD, len(case.up), options, nodes)
            for dispatcher in (flat, hops):
                with recorded_all_to_alls(splits=True) as events:
                    outputs_and_gradients(case, worker.rank, 4, dispatcher)
                traffic = meter.take()
                assert sum(tally.bytes for tally in traffic.values()) == _sent_elsewhere(events)
                by_peer = [0] * 4
                for name, launched in events:
                    if name == "launch":
                        sent, _, splits, _ = launched
                        for peer, rows in enumerate(splits):
                            by_peer[peer] += rows * sent[:1].nbytes
                between = sum(by_peer[peer] for peer in range(4) if nodes[peer] != nodes[worker.rank])
                assert sum(tally.bytes for kind, tally in traffic.items() if kind.link == "between") == between

    pool.run(compare, 4)


HIDDEN, EXPERTS, TOP_K, GROUPS, LIMIT, TOKENS = 7168, 256, 8, 8, 4, 12


def _v3_choices(rank: int) -> Tensor:
    """Experts of this rank's tokens, chosen by the router."""
    config = ModelConfig(hidden_size=64, n_group=GROUPS, topk_group=LIMIT, num_hidden_layers=4)
    router = Router(config)
    generator = torch.Generator().manual_seed(5)
    router.weight.data = torch.randn(router.weight.shape, generator=generator) / 8
    x = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(100 + rank))
    with torch.no_grad():
        return router(x, torch.ones(1, dtype=torch.bool)).expert_ids


def _v3_traffic(worker: Worker) -> tuple[Traffic, Traffic, Tensor]:
    ids, group = _v3_choices(worker.rank), dist.group.WORLD
    meter = Meter({rank: rank for rank in range(8)})
    flat = FlatDispatcher(group, EXPERTS, DispatchOptions(meter=meter))
    hops = TwoHopDispatcher(group, EXPERTS, DispatchOptions(wire=FP8Wire(), meter=meter), range(8))
    found = [_round_trip(dispatcher, ids, meter) for dispatcher in (flat, hops)]
    return found[0], found[1], ids


def _round_trip(dispatcher: RoutedDispatcher, ids: Tensor, meter: Meter) -> Traffic:
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    dispatched = dispatcher.dispatch(x, ids, torch.ones(TOKENS, TOP_K, requires_grad=True))
    out = dispatcher.combine(dispatched.x * dispatched.weights[:, None].bfloat16(), dispatched)
    out.sum().backward()
    return meter.take()


def test_v3s_shape_sends_a_quarter_of_flat_bf16_between_nodes(pool: Pool) -> None:
    """Eight nodes with one rank each send each other as much as nodes with eight ranks each.

    The expected numbers are counted from the router's choices alone.
    """
    results = pool.run(_v3_traffic, 8)

    def between(number: int, purpose: str) -> int:
        kind = Kind(purpose, "all_to_all", "between")
        return sum(result[number][kind].bytes for result in results)

    copies = crossings = 0
    for rank, (_, _, ids) in enumerate(results):
        for token in (ids // (EXPERTS // GROUPS)).tolist():
            assert len(set(token)) <= LIMIT
            copies += sum(node != rank for node in token)
            crossings += len(set(token) - {rank})
    message = HIDDEN + 4 * HIDDEN // 128 + (4 + 2) * TOP_K  # codes, scales; gate weights and numbers of experts
    assert between(0, "dispatch") == copies * (2 * HIDDEN + 4)
    assert between(1, "dispatch") == crossings * message
    assert between(0, "combine") == copies * 2 * HIDDEN
    assert between(1, "combine") == crossings * 2 * HIDDEN
    assert between(1, "combine backward") == crossings * (HIDDEN + 4 * HIDDEN // 128)
    assert between(1, "dispatch backward") == crossings * (2 * HIDDEN + 4 * TOP_K)
    flat_rows = copies * 2 * HIDDEN  # without gate weights
    assert between(1, "dispatch") / flat_rows <= 0.27
    assert between(1, "combine") / flat_rows <= 0.51


def test_collectives_count_a_ring_by_its_links(pool: Pool) -> None:
    def count(worker: Worker) -> Traffic:
        meter = Meter(dict(enumerate([0, 0, 1, 1])))
        group = meter.group(dist.group.WORLD)
        group.reduce_scatter("gradients", 100)
        group.all_gather("weights", 10)
        group.all_reduce("statistics", 6)
        return meter.take()

    for rank, traffic in enumerate(pool.run(count, 4)):
        link = ("within", "between", "within", "between")[rank]
        assert traffic == {
            Kind("gradients", "reduce_scatter", link): Tally(300, 3),
            Kind("weights", "all_gather", link): Tally(30, 3),
            Kind("statistics", "all_reduce", link): Tally(12, 6),  # pieces of two bytes
        }


def test_numbers_are_equivalent_to_traffic() -> None:
    traffic = {KINDS[3]: Tally(10, 2), KINDS[-1]: Tally(7, 1)}
    numbers = numbers_of(traffic)
    assert len(numbers) == 2 * len(KINDS) and traffic_of(numbers) == traffic
    twice = traffic_of([2 * number for number in numbers])
    assert twice[KINDS[3]] == Tally(20, 4)


def test_unknown_purposes_and_collectives_are_refused() -> None:
    meter = Meter({0: 0})
    for purpose, collective in (("dispatch", "all_reduce"), ("weights", "send")):
        with pytest.raises(AssertionError):
            meter.count(purpose, collective, "within", 1)
    assert meter.take() == {}
