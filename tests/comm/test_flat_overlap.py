"""Asynchronous forms: same bits, real overlap in both directions, recomputation, cut graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from counterflow.comm.dispatcher import Dispatcher
from counterflow.comm.flat import FlatDispatcher
from counterflow.tests.comm.layer import (
    make_case,
    outputs_and_gradients,
    recorded_all_to_alls,
    run_experts,
    through_dispatcher,
)
from counterflow.tests.pool import Pool, Worker

TOKENS, EXPERTS, TOP_K = [9, 4, 0, 7], 8, 3


def _assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"other bits in {different}"


def test_async_equals_sync_bitwise_with_two_micro_batches_in_flight(pool: Pool) -> None:
    def compare(worker: Worker) -> None:
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        for dtype in (torch.float32, torch.bfloat16):
            cases = [make_case(seed, TOKENS, EXPERTS, TOP_K, dtype) for seed in (0, 1)]
            leaves: list[dict[str, Tensor]] = []
            for case in cases:
                local = slice(worker.rank * 2, worker.rank * 2 + 2)
                values = case.x[worker.rank], case.weights[worker.rank], case.up[local], case.down[local]
                named = zip(("x", "weights", "up", "down"), values, strict=True)
                leaves.append({name: value.clone().requires_grad_() for name, value in named})
            ids = [case.expert_ids[worker.rank] for case in cases]
            sent = [
                dispatcher.begin_dispatch(leaf["x"], expert_ids, leaf["weights"])
                for leaf, expert_ids in zip(leaves, ids, strict=True)
            ]
            dispatched = [pending.wait() for pending in reversed(sent)][::-1]
            outputs = [
                run_experts(rows, leaf["up"], leaf["down"]) for rows, leaf in zip(dispatched, leaves, strict=True)
            ]
            returned = [dispatcher.begin_combine(y, rows) for y, rows in zip(outputs, dispatched, strict=True)]
            combined = [pending.wait() for pending in returned]
            torch.autograd.backward(combined, [case.grads[worker.rank] for case in cases])
            for case, leaf, out in zip(cases, leaves, combined, strict=True):
                found: dict[str, Any] = {"out": out.detach()} | {name: value.grad for name, value in leaf.items()}
                _assert_equal_bits(found, outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher))

    pool.run(compare, 4)


def test_backward_overlaps_the_work_between_begin_and_wait(pool: Pool) -> None:
    def order_of_events(worker: Worker) -> list[str]:
        class Marked(torch.autograd.Function):
            """Work of a shared expert: independent of the rows, between launch and wait in the forward."""

            @staticmethod
            def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
                ctx.name = name
                return 2 * x

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
                events.append((ctx.name, None))
                return 2 * grad, None

        case = make_case(0, TOKENS, EXPERTS, TOP_K, torch.float32)
        x = case.x[worker.rank].requires_grad_()
        weights = case.weights[worker.rank].requires_grad_()
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        pending = dispatcher.begin_dispatch(x, case.expert_ids[worker.rank], weights)
        during_dispatch = Marked.apply(x, "during dispatch")
        dispatched = pending.wait()
        y = run_experts(dispatched, case.up[:2], case.down[:2])
        returning = dispatcher.begin_combine(y, dispatched)
        during_combine = Marked.apply(x, "during combine")
        out = returning.wait() + during_combine + during_dispatch
        with recorded_all_to_alls() as events:
            out.sum().backward()
        return [name for name, _ in events]

    around_combine = ["launch", "during combine", "wait"]
    around_dispatch = ["launch", "launch", "during dispatch", "wait", "wait"]  # rows and gate weights
    assert pool.run(order_of_events, 4) == [around_combine + around_dispatch] * 4


def test_recomputation_gives_the_same_bits_and_does_not_repeat_the_combine(pool: Pool) -> None:
    def recomputed(dispatcher: Dispatcher, *inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(through_dispatcher, dispatcher, *inputs, use_reentrant=False)
        return result

    def compare(worker: Worker) -> tuple[int, int]:
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(7, TOKENS, EXPERTS, TOP_K, dtype)
            plain = outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher)
            with recorded_all_to_alls() as events:
                found = outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher, recomputed)
            _assert_equal_bits(found, plain)
        names = [name for name, _ in events]
        return names.count("launch"), names.count("wait")

    # Four forward and three backward, and in between counts, rows and gate weights once more.
    assert pool.run(compare, 4) == [(10, 10)] * 4


def test_saved_tensors_may_be_offloaded(pool: Pool) -> None:
    """Hooks that return copies, as offloading does, change nothing."""

    def with_hooks(dispatcher: Dispatcher, *inputs: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda kept: kept.clone()):
            return through_dispatcher(dispatcher, *inputs)

    def compare(worker: Worker) -> None:
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        case = make_case(11, TOKENS, EXPERTS, TOP_K, torch.float32)
        plain = outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher)
        _assert_equal_bits(outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher, with_hooks), plain)

    pool.run(compare, 4)


def test_the_graph_can_be_cut_at_the_ticket(pool: Pool) -> None:
    """Backward of a begun dispatch or combine in two halves: one launches, the other waits."""

    def compare(worker: Worker) -> list[str]:
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        case = make_case(13, TOKENS, EXPERTS, TOP_K, torch.float32)
        tickets: dict[str, tuple[Tensor, Tensor]] = {}

        def cut(pending: Any, name: str) -> Any:
            whole = pending.ticket
            pending.ticket = whole.detach().requires_grad_()
            tickets[name] = whole, pending.ticket
            return pending.wait()

        def finish(name: str) -> None:
            whole, leaf = tickets[name]
            events.append((f"between the halves of {name}", None))
            whole.backward(leaf.grad)

        local = slice(worker.rank * 2, worker.rank * 2 + 2)
        values = case.x[worker.rank], case.weights[worker.rank], case.up[local], case.down[local]
        x, weights, up, down = (value.clone().requires_grad_() for value in values)
        dispatched = cut(dispatcher.begin_dispatch(x, case.expert_ids[worker.rank], weights), "dispatch")
        y = run_experts(dispatched, up, down)
        out = cut(dispatcher.begin_combine(y, dispatched), "combine")
        expected = outputs_and_gradients(case, worker.rank, worker.world_size, dispatcher)
        with recorded_all_to_alls() as events:
            out.backward(case.grads[worker.rank])
            finish("combine")  # continues through the experts to the dispatch, which it launches
            finish("dispatch")
        found = {"out": out.detach(), "x": x.grad, "weights": weights.grad, "up": up.grad, "down": down.grad}
        _assert_equal_bits(found, expected)
        return [name for name, _ in events]

    halves = ["launch", "between the halves of combine", "wait"]
    halves += ["launch", "launch", "between the halves of dispatch", "wait", "wait"]
    assert pool.run(compare, 4) == [halves] * 4


def test_a_kept_graph_gives_the_same_gradients_twice(pool: Pool) -> None:
    def backward_twice(worker: Worker) -> None:
        dispatcher = FlatDispatcher(dist.group.WORLD, EXPERTS)
        case = make_case(17, TOKENS, EXPERTS, TOP_K, torch.float32)
        x = case.x[worker.rank].requires_grad_()
        weights = case.weights[worker.rank].requires_grad_()
        ids = case.expert_ids[worker.rank]
        out = through_dispatcher(dispatcher, x, ids, weights, case.up[:2], case.down[:2])
        first = torch.autograd.grad(out, (x, weights), case.grads[worker.rank], retain_graph=True)
        second = torch.autograd.grad(out, (x, weights), case.grads[worker.rank])
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))

    pool.run(backward_twice, 4)
