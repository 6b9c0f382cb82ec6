"""Small MoE layer on top of a dispatcher, and the same layer written densely: no routing, no groups, FP64.

T tokens, K top-k, E experts, H hidden, F the experts' inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm import exchange
from counterflow.comm.dispatcher import Dispatched, Dispatcher

HIDDEN, INNER = 16, 12


@dataclass
class Case:
    """Inputs of all ranks, equal on every rank; rank r's tokens are x[r], and so on."""

    x: list[Tensor]  # [T, H] each, any T
    expert_ids: list[Tensor]  # int64 [T, K]
    weights: list[Tensor]  # FP32 [T, K]
    up: Tensor  # [E, H, F]
    down: Tensor  # [E, F, H]
    grads: list[Tensor]  # [T, H], gradient of the loss for each rank's output


def make_case(
    seed: int, tokens: list[int], num_experts: int, top_k: int, dtype: torch.dtype, candidates: int | None = None
) -> Case:
    """Random inputs; `candidates` restricts the choice to that many first experts, so that the others stay empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    choices = candidates or num_experts
    return Case(
        x=[normal(n, HIDDEN) for n in tokens],
        expert_ids=[torch.rand(n, choices, generator=generator).topk(top_k).indices for n in tokens],
        weights=[torch.rand(n, top_k, generator=generator) for n in tokens],
        up=normal(num_experts, HIDDEN, INNER) / HIDDEN**0.5,
        down=normal(num_experts, INNER, HIDDEN) / INNER**0.5,
        grads=[normal(n, HIDDEN) for n in tokens],
    )


def run_experts(dispatched: Dispatched, up: Tensor, down: Tensor) -> Tensor:
    """Run each local expert on its rows, with gate weights applied before the down projection."""
    outputs = []
    parts = dispatched.x.split(dispatched.tokens_per_expert), dispatched.weights.split(dispatched.tokens_per_expert)
    for expert, (rows, weights) in enumerate(zip(*parts, strict=True)):
        inner = torch.nn.functional.silu(rows @ up[expert]) * weights[:, None].to(rows.dtype)
        outputs.append(inner @ down[expert])
    return torch.cat(outputs)


def through_dispatcher(
    dispatcher: Dispatcher, x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    dispatched = dispatcher.dispatch(x, expert_ids, weights)
    return dispatcher.combine(run_experts(dispatched, up, down), dispatched)


Layer = Callable[[Dispatcher, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def outputs_and_gradients(
    case: Case, rank: int, size: int, dispatcher: Dispatcher, layer: Layer = through_dispatcher
) -> dict[str, Tensor]:
    """Output and gradients of this rank, including its experts' weight gradients."""
    local = slice(rank * len(case.up) // size, (rank + 1) * len(case.up) // size)
    leaves = {"x": case.x[rank], "weights": case.weights[rank], "up": case.up[local], "down": case.down[local]}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    out = layer(dispatcher, leaves["x"], case.expert_ids[rank], leaves["weights"], leaves["up"], leaves["down"])
    out.backward(case.grads[rank])
    found = {"out": out.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient for {name}"
        found[name] = leaf.grad
    return found


def dense_reference(case: Case, rank: int, size: int) -> dict[str, Tensor]:
    """Expected `outputs_and_gradients`: every expert on every token of every rank, masked, in FP64."""
    x, weights = (torch.cat(part).double().requires_grad_() for part in (case.x, case.weights))
    up, down = (part.double().requires_grad_() for part in (case.up, case.down))
    expert_ids = torch.cat(case.expert_ids)
    out = torch.zeros_like(x)
    for expert in range(len(up)):
        gate = (weights * (expert_ids == expert)).sum(1, keepdim=True)  # zero for a token that did not choose it
        out = out + torch.nn.functional.silu(x @ up[expert]) * gate @ down[expert]
    out.backward(torch.cat(case.grads).double())
    tokens = [len(part) for part in case.x]
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    local = slice(rank * len(up) // size, (rank + 1) * len(up) // size)
    assert x.grad is not None and weights.grad is not None and up.grad is not None and down.grad is not None
    return {
        "out": out.detach()[own],
        "x": x.grad[own],
        "weights": weights.grad[own],
        "up": up.grad[local],
        "down": down.grad[local],
    }


def assert_close_to_dense(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, name: str) -> None:
    """Check errors relative to the largest expected value of each tensor, or to 1, the size of the inputs."""
    for key, reference in expected.items():
        assert found[key].shape == reference.shape, f"{name}: {key} is {found[key].shape}, not {reference.shape}"
        if reference.numel():
            error = (found[key].double() - reference).abs().max() / reference.abs().max().clamp_min(1.0)
            assert error <= tolerance, f"{name}: {key} is off by {error:.2e}, more than {tolerance:.0e}"


@contextmanager
def recorded_all_to_alls(splits: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """Record all-to-alls in a list, as ("launch", (sent, received)) and ("wait", None).

    With `splits` a launch also has the number of rows for each rank, and the number of this rank.
    """
    original = exchange.begin_all_to_all
    events: list[tuple[str, Any]] = []

    class Works:
        def __init__(self, works: list[dist.Work]) -> None:
            self.works = works

        def wait(self) -> None:
            events.append(("wait", None))
            for work in self.works:
                work.wait()

    def recorded(received: Tensor, sent: Tensor, *args: Any) -> list[Any]:
        more = (args[1], args[2].rank()) if splits else ()
        events.append(("launch", (sent, received, *more)))
        return [Works(original(received, sent, *args))]

    with mock.patch.object(exchange, "begin_all_to_all", recorded):
        yield events


def count_launches(events: list[tuple[str, Any]]) -> int:
    return sum(name == "launch" for name, _ in events)
