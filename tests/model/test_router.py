"""Router against the report's equations written as loops (`reference.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.model.config import ModelConfig
from counterflow.model.router import Router, Routing, update_bias
from counterflow.tests.model.reference import TokenRouting, balance_of_sequence, count_tokens, route_token
from counterflow.tests.model.small import relative_error, small_config

SHAPES: dict[str, dict[str, Any]] = {
    "V3 in small": {"n_routed_experts": 32, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
    "one group": {"n_routed_experts": 12, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
    "all groups": {"n_routed_experts": 12, "n_group": 4, "topk_group": 4, "num_experts_per_tok": 3},
    "groups used up": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 6},
    "top 1": {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "groups of one": {"n_routed_experts": 6, "n_group": 6, "topk_group": 3, "num_experts_per_tok": 2},
    "raw scores": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}


def make(config: ModelConfig, bias: float = 0.0, spread: float = 0.3, seed: int = 0) -> Router:
    """Router with random weights, and biases of the given mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(config)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3, generator=generator)
        router.bias.normal_(bias, spread, generator=generator)
    return router


def inputs(config: ModelConfig, sequences: int = 3, length: int = 17, seed: int = 1) -> Tensor:
    return torch.randn(sequences, length, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def literal(router: Router, x: Tensor) -> tuple[list[list[TokenRouting]], Tensor, Tensor]:
    """Routing of each sequence, and the FP64 input and weight that get its gradients."""
    x64 = x.double().requires_grad_()
    weight = router.weight.detach().double().requires_grad_()
    logits = x64 @ weight.T
    bias = router.bias.double()
    return [[route_token(router.config, token, bias) for token in sequence] for sequence in logits], x64, weight


def all_valid(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def assert_same_choice(routing: Routing, expected: list[list[TokenRouting]]) -> None:
    """Check for the same experts with the same weights for each token, in any order."""
    tokens = [token for sequence in expected for token in sequence]
    assert routing.expert_ids.dtype == torch.int64 and routing.weights.dtype == torch.float32
    for ids, weights, token in zip(routing.expert_ids.tolist(), routing.weights.tolist(), tokens, strict=True):
        wanted = {expert: gate.item() for expert, gate in zip(token.experts, token.gates, strict=True)}
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_selection_weights_and_counts_equal_the_equations(shape: dict[str, Any]) -> None:
    config = small_config(**shape)
    router, x = make(config), inputs(config)
    routing = router(x, all_valid(x))
    expected, _, _ = literal(router, x)
    assert_same_choice(routing, expected)
    assert routing.counts.tolist() == count_tokens(config, [token for sequence in expected for token in sequence])


def test_closed_groups_stay_closed_where_every_biased_score_is_negative() -> None:
    config = small_config(**SHAPES["groups used up"])
    router, x = make(config, bias=-3.0), inputs(config)
    expected, _, _ = literal(router, x)
    assert_same_choice(router(x, all_valid(x)), expected)


def test_a_group_counts_by_its_two_best_experts() -> None:
    """Group 0 has the best expert, group 1 the best pair."""
    config = small_config(hidden_size=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    router = make(config)
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor([2.0, -2.0, 1.0, 0.9])))
        router.bias.zero_()
    routing = router(torch.ones(1, 1, 4), torch.tensor([True]))
    assert sorted(routing.expert_ids[0].tolist()) == [2, 3]


def test_bias_moves_the_choice_and_never_the_weights() -> None:
    config = small_config(n_routed_experts=12, n_group=1, topk_group=1, num_experts_per_tok=4)
    x = inputs(config)
    router = make(config, spread=0.0)
    before = router(x, all_valid(x))
    router.bias.add_(5.0)  # the same for all: the choice stays
    same = router(x, all_valid(x))
    assert torch.equal(before.expert_ids.sort().values, same.expert_ids.sort().values)
    assert torch.equal(before.weights.sort().values, same.weights.sort().values)
    router.bias[:4] += 5.0  # now every token selects the first four
    forced = router(x, all_valid(x))
    assert torch.equal(forced.expert_ids.sort().values, torch.arange(4).expand(x.shape[0] * x.shape[1], 4))
    scores = (x.flatten(0, 1) @ router.weight.T).sigmoid().gather(1, forced.expert_ids)
    assert torch.allclose(forced.weights, 2.5 * scores / scores.sum(-1, keepdim=True), rtol=1e-5)
    assert not router.bias.requires_grad


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_the_gate_weights_equal_the_equations(shape: dict[str, Any]) -> None:
    config = small_config(**shape)
    router, x = make(config), inputs(config).requires_grad_()
    expected, x64, weight = literal(router, x.detach())
    routing = router(x, all_valid(x))
    factor = torch.randn(config.n_routed_experts, generator=torch.Generator().manual_seed(2))  # one factor per expert
    (routing.weights * factor[routing.expert_ids]).sum().backward()
    tokens = [token for sequence in expected for token in sequence]
    sum(
        gate * factor[expert].double()
        for token in tokens
        for expert, gate in zip(token.experts, token.gates, strict=True)
    ).backward()
    assert relative_error(router.weight.grad, weight.grad) < 1e-5
    assert relative_error(x.grad, x64.grad) < 1e-5


@pytest.mark.parametrize("valid", [[True, True, True], [True, False, True], [False, False, False]])
def test_balance_loss_and_its_gradient_alone_equal_the_equations(valid: list[bool]) -> None:
    config = small_config(**SHAPES["V3 in small"])
    router, x = make(config), inputs(config).requires_grad_()
    expected, x64, weight = literal(router, x.detach())
    counted = [sequence for sequence, counts in zip(expected, valid, strict=True) if counts]
    wanted = sum((balance_of_sequence(config, sequence) for sequence in counted), 0 * weight.sum() + 0 * x64.sum())
    routing = router(x, torch.tensor(valid))
    assert routing.balance.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert routing.counts.tolist() == count_tokens(config, [token for sequence in counted for token in sequence])
    routing.balance.backward()
    wanted.backward()
    assert relative_error(router.weight.grad, weight.grad) < 1e-5
    assert relative_error(x.grad, x64.grad) < 1e-5


def test_balance_loss_of_perfect_balance_is_one_and_of_collapse_is_experts_over_top_k() -> None:
    config = small_config(hidden_size=8, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2)
    router = make(config)
    with torch.no_grad():
        router.weight.copy_(60 * torch.eye(8) - 30)
    pairs = torch.eye(8) + torch.eye(8).roll(1, 0)  # token i selects experts i and i + 1
    uniform = router(pairs.unsqueeze(0), torch.tensor([True]))
    assert uniform.balance.item() == pytest.approx(1.0, abs=1e-3)
    collapsed = router(pairs[:1].expand(1, 8, 8), torch.tensor([True]))
    assert collapsed.balance.item() == pytest.approx(8 / 2, abs=1e-2)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)])
def test_balance_loss_does_not_depend_on_how_sequences_are_split(sizes: tuple[int, ...]) -> None:
    config = small_config(**SHAPES["V3 in small"])
    x = inputs(config, sequences=4)
    whole, split = make(config), make(config)
    together = whole(x, all_valid(x)).balance
    together.backward()
    parts = [split(piece, all_valid(piece)).balance for piece in x.split(sizes)]
    for part in parts:
        part.backward()
    assert sum(part.item() for part in parts) == pytest.approx(together.item(), rel=1e-6)
    assert relative_error(split.weight.grad, whole.weight.grad) < 1e-5


def test_balance_loss_is_per_sequence_and_not_per_batch() -> None:
    """Two sequences that each collapse on a different expert are balanced together, but each counts in full."""
    config = small_config(hidden_size=2, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)
    router = make(config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[20.0, -20.0], [-20.0, 20.0]]))
    x = torch.eye(2).unsqueeze(1).expand(2, 6, 2)
    assert router(x, all_valid(x)).balance.item() == pytest.approx(4.0, rel=1e-5)


def test_bf16_inputs_are_scored_in_fp32() -> None:
    config = small_config(**SHAPES["V3 in small"])
    router = make(config).bfloat16()
    router.bias = router.bias.float()
    x = inputs(config).bfloat16()
    expected, _, _ = literal(router, x)
    assert_same_choice(router(x, all_valid(x)), expected)


@pytest.mark.parametrize("speed", [0.001, 0.25])
def test_bias_moves_by_the_speed_against_the_load(speed: float) -> None:
    counts = torch.tensor([[7, 0, 3, 2, 5], [4, 4, 4, 4, 4], [0, 0, 0, 0, 1]])
    bias = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = bias.tolist()
    for row, loads in zip(expected, counts.tolist(), strict=True):
        for expert, load in enumerate(loads):
            if load * len(loads) > sum(loads):
                row[expert] -= speed
            elif load * len(loads) < sum(loads):
                row[expert] += speed
    update_bias(bias, counts, speed)
    for row, wanted in zip(bias.tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


def test_bias_update_compares_loads_exactly_in_large_batches() -> None:
    """A global batch of 2^26 choices is beyond what FP32 counts exactly."""
    counts = torch.full((2,), 2**25, dtype=torch.int64) + torch.tensor([1, 0])
    bias = torch.zeros(2)
    update_bias(bias, counts, 1.0)
    assert bias.tolist() == [-1.0, 1.0]


def test_updates_balance_a_skewed_router() -> None:
    config = small_config(n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2)
    router, x = make(config, spread=0.0), inputs(config, sequences=8, length=64)
    x = x + 1.0  # a common part, which favours the same experts for every token
    excess = []
    for _ in range(200):
        counts = router(x, all_valid(x)).counts
        excess.append((counts.max() / counts.double().mean() - 1).item())
        update_bias(router.bias, counts, 0.01)
    assert excess[0] > 0.5 and excess[-1] < 0.1
