"""Flat dispatch and combine against a dense layer, and their guarantees of order, groups and bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from counterflow.comm.exchange import Exchange
from counterflow.comm.flat import FlatDispatcher
from counterflow.settings import UsageError
from counterflow.tests.comm.layer import (
    assert_close_to_dense,
    count_launches,
    dense_reference,
    make_case,
    outputs_and_gradients,
    recorded_all_to_alls,
    run_experts,
)
from counterflow.tests.pool import Pool, Worker

# (tokens of ranks 0, 1, ...; experts; top-k; number of experts that are chosen from, None for all)
ROUTINGS = [
    ([5, 9, 2, 7], 8, 2, None),
    ([16, 16, 16, 16], 12, 4, None),
    ([6, 6, 6, 6], 8, 1, None),
    ([3, 4, 5, 6], 4, 4, None),  # K = E
    ([8, 8, 8, 8], 8, 1, 1),  # all tokens to one expert
    ([9, 3, 4, 4], 8, 2, 3),  # most experts and some ranks stay empty
    ([0, 7, 0, 3], 8, 3, None),  # ranks without tokens
    ([0, 0, 0, 1], 4, 1, 1),
    ([0, 0, 0, 0], 8, 2, None),
    ([1, 1, 1, 1], 16, 5, None),
]


def _check_routings(worker: Worker, dtype: torch.dtype, tolerance: float, seeds: int) -> None:
    dispatchers = {}
    for seed in range(seeds):
        for number, (tokens, experts, top_k, candidates) in enumerate(ROUTINGS):
            case = make_case(100 * seed + number, tokens[: worker.world_size], experts, top_k, dtype, candidates)
            if experts not in dispatchers:
                dispatchers[experts] = FlatDispatcher(dist.group.WORLD, experts)
            found = outputs_and_gradients(case, worker.rank, worker.world_size, dispatchers[experts])
            expected = dense_reference(case, worker.rank, worker.world_size)
            assert_close_to_dense(found, expected, tolerance, f"seed {seed}, routing {number}")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_flat_equals_the_dense_layer_in_fp32(pool: Pool, ranks: int) -> None:
    pool.run(_check_routings, ranks, torch.float32, 1e-6, 6)


@pytest.mark.parametrize("ranks", [1, 4])
def test_flat_equals_the_dense_layer_in_bf16(pool: Pool, ranks: int) -> None:
    pool.run(_check_routings, ranks, torch.bfloat16, 2e-2, 2)


def test_rows_arrive_by_expert_then_source_then_token(pool: Pool) -> None:
    tokens, experts, top_k = [4, 0, 7, 5], 8, 3
    case = make_case(0, tokens, experts, top_k, torch.float32)

    def received(worker: Worker) -> tuple[list[float], list[float], list[int], list[int]]:
        x = torch.full((tokens[worker.rank], 1), 100.0 * worker.rank)
        x += torch.arange(tokens[worker.rank])[:, None]
        dispatched = FlatDispatcher(dist.group.WORLD, experts).dispatch(
            x, case.expert_ids[worker.rank], case.weights[worker.rank]
        )
        counts, ends = dispatched.tokens_per_expert, dispatched.offsets
        assert ends.dtype == torch.int32
        return dispatched.x.flatten().tolist(), dispatched.weights.tolist(), counts, ends.tolist()

    for rank, (labels, weights, counts, ends) in enumerate(pool.run(received, 4)):
        expected_labels, expected_weights, expected_counts = [], [], []
        for expert in range(2 * rank, 2 * rank + 2):
            before = len(expected_labels)
            for source in range(4):
                for token, chosen in enumerate(case.expert_ids[source].tolist()):
                    if expert in chosen:
                        expected_labels.append(100.0 * source + token)
                        expected_weights.append(case.weights[source][token, chosen.index(expert)].item())
            expected_counts.append(len(expected_labels) - before)
        assert (labels, weights) == (expected_labels, expected_weights)
        assert counts == expected_counts
        assert ends == [expected_counts[0], sum(expected_counts)]


def test_combine_has_the_same_bits_in_every_layout(pool: Pool) -> None:
    """Copies and slot-ordered sums do not depend on the rows' ranks: dispatch and combine, without experts."""
    case = make_case(0, [24], 8, 4, torch.float32)

    def round_trip(worker: Worker) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(24 * worker.rank // worker.world_size, 24 * (worker.rank + 1) // worker.world_size)
        x = case.x[0][own].clone().requires_grad_()
        dispatcher = FlatDispatcher(dist.group.WORLD, 8)
        dispatched = dispatcher.dispatch(x, case.expert_ids[0][own], case.weights[0][own])
        out = dispatcher.combine(dispatched.x * dispatched.weights[:, None], dispatched)
        out.backward(case.grads[0][own])
        assert x.grad is not None
        return out.detach(), x.grad

    one = [torch.cat(parts) for parts in zip(*pool.run(round_trip, 1), strict=True)]
    for ranks in (2, 4, 8):
        many = [torch.cat(parts) for parts in zip(*pool.run(round_trip, ranks), strict=True)]
        assert all(map(torch.equal, many, one))


def test_disjoint_groups_in_one_world_do_not_touch_each_other(pool: Pool) -> None:
    def two_grids(worker: Worker) -> None:
        grid = worker.rank // 2
        group = dist.new_group([2 * grid, 2 * grid + 1], use_local_synchronization=True)
        dispatcher = FlatDispatcher(group, 4 + 4 * grid)
        for call in range(3 + 4 * grid):  # numbers of calls, experts and tokens, and data, differ
            case = make_case(10 * call + grid, [5 + grid, 3 + call], 4 + 4 * grid, 2, torch.float32)
            found = outputs_and_gradients(case, worker.rank % 2, 2, dispatcher)
            assert_close_to_dense(found, dense_reference(case, worker.rank % 2, 2), 1e-6, f"grid {grid}, call {call}")

    pool.run(two_grids, 4)


def test_group_of_one_communicates_nothing_and_a_layer_costs_seven_all_to_alls(pool: Pool) -> None:
    def count(worker: Worker, size: int) -> tuple[int, int]:
        group = dist.group.WORLD if size > 1 else dist.new_group([worker.rank], use_local_synchronization=True)
        case = make_case(0, [6] * size, 4, 2, torch.float32)
        # Every collective goes through the group's backend, whose sequence number counts unexpected ones too.
        before = group._get_sequence_number_for_group()
        with recorded_all_to_alls() as events:
            outputs_and_gradients(case, worker.rank if size > 1 else 0, size, FlatDispatcher(group, 4))
        return count_launches(events), group._get_sequence_number_for_group() - before

    assert pool.run(count, 2, 1) == [(0, 0)] * 2
    # Forward: counts, rows, gate weights, outputs. Backward: the same without counts. Each a send and a receive.
    assert pool.run(count, 2, 2) == [(7, 14)] * 2


def test_counts_sent_ahead_give_the_same_bits_and_are_sent_once(pool: Pool) -> None:
    def compare(worker: Worker) -> list[int]:
        dispatcher = FlatDispatcher(dist.group.WORLD, 8)
        launched: list[int] = []

        def sent_ahead(dispatcher: FlatDispatcher, x: Tensor, ids: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
            with recorded_all_to_alls() as events:
                route = dispatcher.begin_route(ids)
                launched.append(count_launches(events))
                pending = dispatcher.begin_dispatch(x, ids, weights, route=route)
                launched.append(count_launches(events))
            dispatched = pending.wait()
            return dispatcher.combine(run_experts(dispatched, *experts), dispatched)

        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(5, [9, 4], 8, 3, dtype)
            plain = outputs_and_gradients(case, worker.rank, 2, dispatcher)
            ahead = outputs_and_gradients(case, worker.rank, 2, dispatcher, sent_ahead)
            assert [name for name, value in plain.items() if not torch.equal(ahead[name], value)] == []
        return launched

    # The counts; then rows and gate weights, without a second exchange of counts.
    assert pool.run(compare, 2) == [[1, 3, 1, 3]] * 2


def test_no_group_is_a_group_of_one() -> None:
    case = make_case(3, [11], 6, 3, torch.float32)
    found = outputs_and_gradients(case, 0, 1, FlatDispatcher(None, 6))
    assert_close_to_dense(found, dense_reference(case, 0, 1), 1e-6, "no group")


def test_all_to_alls_do_not_change_their_inputs(pool: Pool) -> None:
    def inputs_stay(worker: Worker) -> int:
        case = make_case(5, [9, 4, 6, 7], 8, 2, torch.float32)
        before = [part[worker.rank].clone() for part in (case.x, case.expert_ids, case.weights)]
        dispatcher = FlatDispatcher(dist.group.WORLD, 8)
        with recorded_all_to_alls() as events:
            outputs_and_gradients(case, worker.rank, 4, dispatcher)
        buffers = [tensor for name, pair in events if name == "launch" for tensor in pair]
        copies = [tensor.clone() for tensor in buffers]
        # All buffers of the first pass are still alive: a second one with other data may write into none of them.
        outputs_and_gradients(make_case(6, [3, 8, 8, 5], 8, 2, torch.float32), worker.rank, 4, dispatcher)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(buffers, copies, strict=True))
        filled = [tensor for tensor in buffers if tensor.numel()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == len(filled), "shared buffers"
        after = [part[worker.rank] for part in (case.x, case.expert_ids, case.weights)]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        return len(buffers)

    assert pool.run(inputs_stay, 4) == [14] * 4


def test_an_exchange_keeps_nothing_after_the_wait(pool: Pool) -> None:
    def kept(worker: Worker) -> list[bool]:
        rows = torch.ones(4, 3)
        sent = StorageWeakRef(rows.untyped_storage())
        exchange = Exchange(rows, [2, 2], [2, 2], dist.group.WORLD)
        del rows
        before, received = sent.expired(), exchange.wait()
        assert torch.equal(received, torch.ones(4, 3))
        arrived = StorageWeakRef(received.untyped_storage())
        del received
        return [before, sent.expired(), arrived.expired()]

    assert pool.run(kept, 2) == [[False, True, True]] * 2


def test_no_gradient_is_made_where_none_is_needed(pool: Pool) -> None:
    def frozen_weights(worker: Worker) -> tuple[bool, bool, int]:
        case = make_case(1, [5, 5], 4, 2, torch.float32)
        dispatcher = FlatDispatcher(dist.group.WORLD, 4)
        x = case.x[worker.rank].requires_grad_()
        with recorded_all_to_alls() as events:
            dispatched = dispatcher.dispatch(x, case.expert_ids[worker.rank], case.weights[worker.rank])
            y = run_experts(dispatched, case.up[:2], case.down[:2])
            dispatcher.combine(y, dispatched).sum().backward()
        return dispatched.x.requires_grad, dispatched.weights.requires_grad, count_launches(events)

    assert pool.run(frozen_weights, 2) == [(True, False, 6)] * 2


def test_a_second_derivative_is_refused() -> None:
    dispatcher = FlatDispatcher(None, 4)
    case = make_case(2, [6], 4, 2, torch.float32)
    x = case.x[0].requires_grad_()
    dispatched = dispatcher.dispatch(x, case.expert_ids[0], case.weights[0])
    out = dispatcher.combine(dispatched.x**2, dispatched).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_group_that_does_not_divide_the_experts_is_refused_with_those_that_do() -> None:
    group = SimpleNamespace(size=lambda: 4)
    with pytest.raises(UsageError, match=r"6 experts .* 4 ranks; parallel.ep can be one of \[1, 2, 3, 6\]"):
        FlatDispatcher(group, 6)


def test_an_expert_id_out_of_range_is_detected() -> None:
    for wrong in (4, 9):  # -1 would be valid: it is sent nowhere
        expert_ids = torch.tensor([[0, 1], [wrong, 2]])
        with pytest.raises(AssertionError, match="1 expert ids are no expert's"):
            FlatDispatcher(None, 4).dispatch(torch.zeros(2, 3), expert_ids, torch.ones(2, 2))
