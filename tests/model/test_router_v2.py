"""V2's router and plain top-k, with losses and token dropping, against V2 §2.2 written as loops, and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from counterflow.model.balance import BalanceWeights
from counterflow.model.capacity import Dropping
from counterflow.model.config import ModelConfig
from counterflow.model.router import Router, Routing
from counterflow.phases import Tape, run
from counterflow.tests.model.small import relative_error, small_config
from counterflow.weight_gradients import WeightQueue

V2: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_routed_experts": 20,
    "n_group": 5,
    "topk_group": 3,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 16.0,
}
PLAIN = V2 | {"topk_method": "greedy", "routed_scaling_factor": 1.0}
V3: dict[str, Any] = {"n_routed_experts": 20, "n_group": 5, "topk_group": 3, "num_experts_per_tok": 4}
ROUTERS = {
    "V2": V2,
    "V2, groups used up": V2 | {"num_experts_per_tok": 12},
    "V2, every group": V2 | {"topk_group": 5},
    "V2, top 1": V2 | {"num_experts_per_tok": 1},
    "V2, sigmoid, normalised": V2 | {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "plain": PLAIN,
    "plain, one group": PLAIN | {"n_group": 1, "topk_group": 1},
    "plain, all experts": PLAIN | {"num_experts_per_tok": 20},
    "V3": V3,
    "V3, softmax": V3 | {"scoring_func": "softmax"},
}
EVERY = pytest.mark.parametrize("shape", ROUTERS.values(), ids=ROUTERS.keys())


def make(config: ModelConfig, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    router = Router(config)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3, generator=generator)
        if router.bias is not None:
            router.bias.normal_(0.0, 0.2, generator=generator)
    return router


def inputs(config: ModelConfig, sequences: int = 4, length: int = 17, skew: float = 0.5, seed: int = 1) -> Tensor:
    """Tokens `[B, S, H]` with a common part, which makes some experts more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(config.hidden_size, generator=generator)
    return torch.randn(sequences, length, config.hidden_size, generator=generator) + skew * common


def all_valid(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def literal_scores(config: ModelConfig, x: Tensor, weight: Tensor) -> Tensor:
    """Affinities `[B, S, E]` in FP64 with a graph."""
    logits = x @ weight.T
    return torch.softmax(logits, -1) if config.scoring_func == "softmax" else 1 / (1 + torch.exp(-logits))


def literal_choice(config: ModelConfig, scores: list[float], bias: list[float]) -> list[int]:
    """Experts of one token, best first."""
    size = config.n_routed_experts // config.n_group
    wanted = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    if config.topk_method == "group_limited_greedy":
        groups = sorted(groups, key=lambda g: max(wanted[i] for i in g), reverse=True)[: config.topk_group]
    elif config.topk_method == "noaux_tc":
        groups.sort(key=lambda g: sum(sorted(wanted[i] for i in g)[-2:]), reverse=True)
        groups = groups[: config.topk_group]
    candidates = [i for group in groups for i in group]
    return sorted(candidates, key=lambda i: wanted[i], reverse=True)[: config.num_experts_per_tok]


def literal_choices(router: Router, scores: Tensor) -> list[list[list[int]]]:
    bias = [0.0] * scores.shape[2] if router.bias is None else router.bias.tolist()
    return [[literal_choice(router.config, token, bias) for token in sequence] for sequence in scores.tolist()]


def literal_losses(config: ModelConfig, scores: Tensor, chosen: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of V2 §2.2.3 for one sequence: scores `[S, E]`, each token's experts; sums over groups of experts."""
    length, experts = scores.shape
    top_k, groups = config.num_experts_per_tok, config.n_group
    size = experts // groups
    counted = chosen
    if config.topk_method == "noaux_tc":  # V3 eq. 18
        rows = [token.tolist() for token in scores]
        counted = [sorted(range(experts), key=lambda i: row[i], reverse=True)[:top_k] for row in rows]
    f = [experts / (top_k * length) * sum(i in token for token in counted) for i in range(experts)]
    p = [sum(token[i] / token.sum() for token in scores) / length for i in range(experts)]
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    most = min(groups, top_k) if config.topk_method == "greedy" else config.topk_group
    f_device = [sum(f[j] for j in group) / size for group in members]
    p_device = [sum(p[j] for j in group) for group in members]
    sent = [sum(any(i in group for i in token) for token in chosen) for group in members]
    f_comm = [groups / (most * length) * count for count in sent]
    expert = sum((a * b for a, b in zip(f, p, strict=True)), torch.zeros(()))
    if groups == 1:
        return expert, 0 * expert, 0 * expert
    device = sum((a * b for a, b in zip(f_device, p_device, strict=True)), torch.zeros(()))
    return expert, device, sum((a * b for a, b in zip(f_comm, p_device, strict=True)), torch.zeros(()))


def losses_of(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    return routing.balance, routing.device, routing.communication


@EVERY
def test_choice_and_gates_equal_the_equations(shape: dict[str, Any]) -> None:
    config = small_config(**shape)
    router, x = make(config), inputs(config)
    routing = router(x, all_valid(x))
    scores = literal_scores(config, x.double(), router.weight.detach().double())
    chosen = [token for sequence in literal_choices(router, scores) for token in sequence]
    for ids, weights, token, row in zip(
        routing.expert_ids.tolist(), routing.weights.tolist(), chosen, scores.flatten(0, 1).tolist(), strict=True
    ):
        total = sum(row[i] for i in token) if config.norm_topk_prob else 1.0
        wanted = {i: row[i] / total * config.routed_scaling_factor for i in token}
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(wanted, rel=1e-5)
    assert routing.counts.tolist() == [sum(i in token for token in chosen) for i in range(20)]
    assert routing.dropped == 0


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_router_equals_transformers(method: str) -> None:
    for seed in range(5):
        config = small_config(**V2 | {"topk_method": method, "hidden_size": 48})
        router, x = make(config, seed), inputs(config, seed=seed)
        reference = DeepseekV2TopkRouter(DeepseekV2Config(**config.model_dump(exclude={"rope_scaling", "rope_theta"})))
        with torch.no_grad():
            reference.weight.copy_(router.weight)
        _, weights, ids = reference(x)
        routing = router(x, all_valid(x))
        dense = torch.zeros(ids.shape[0], 20)
        expected = dense.scatter(1, ids, weights)
        torch.testing.assert_close(dense.scatter(1, routing.expert_ids, routing.weights), expected, rtol=1e-5, atol=0)


def test_a_group_counts_by_its_best_expert() -> None:
    """Group 0 has the best expert, group 1 the best pair: V2 takes group 0, V3 group 1."""
    for method, experts in (("group_limited_greedy", [0, 1]), ("noaux_tc", [2, 3])):
        config = small_config(
            hidden_size=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, topk_method=method
        )
        router = Router(config)
        with torch.no_grad():
            router.weight.copy_(torch.diag(torch.tensor([2.0, -2.0, 1.0, 0.9])))
        assert sorted(router(torch.ones(1, 1, 4), torch.tensor([True])).expert_ids[0].tolist()) == experts


def test_only_v3s_method_has_a_bias() -> None:
    for shape in ROUTERS.values():
        router = Router(small_config(**shape))
        assert (router.bias is not None) == ("topk_method" not in shape)
        assert ("bias" in router.state_dict()) == (router.bias is not None)


@pytest.mark.parametrize("split", [(4,), (1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("loss", [0, 1, 2], ids=["expert", "device", "communication"])
@EVERY
def test_gradient_of_each_loss_alone_equals_the_formula_in_any_split(
    shape: dict[str, Any], loss: int, split: tuple[int, ...]
) -> None:
    config, valid = small_config(**shape), torch.tensor([True, True, False, True])
    router, x = make(config), inputs(config)
    x64, weight = x.double().requires_grad_(), router.weight.detach().double().requires_grad_()
    scores = literal_scores(config, x64, weight)
    chosen = literal_choices(router, scores.detach())
    terms = [literal_losses(config, scores[b], chosen[b])[loss] for b in range(4) if valid[b]]
    expected = sum(terms, 0 * weight.sum() + 0 * x64.sum())
    expected.backward()

    pieces = [piece.requires_grad_() for piece in x.split(split)]
    found = [losses_of(router(piece, mask))[loss] for piece, mask in zip(pieces, valid.split(split), strict=True)]
    assert sum(float(value) for value in found) == pytest.approx(expected.item(), rel=1e-5)
    if loss and config.n_group == 1:
        assert not any(value.requires_grad for value in found)
        return
    for value in found:
        value.backward()
    # In balance the gradient is a difference of equal terms: only rounding is left.
    scale = max(float(weight.grad.norm()), 1e-2)
    assert float((router.weight.grad - weight.grad).norm()) / scale < 2e-5
    gradient = torch.cat([piece.grad for piece in pieces])
    assert float((gradient - x64.grad).norm()) / max(float(x64.grad.norm()), 1e-2) < 2e-5


def test_losses_of_perfect_balance_are_one() -> None:
    """Token t prefers experts t and t + 4, of different groups: experts, groups and pairs of groups are used alike."""
    config = small_config(**V2 | {"hidden_size": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
                                  "num_experts_per_tok": 2})  # fmt: skip
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(60 * torch.eye(8))
    x = torch.eye(8) + torch.eye(8).roll(4, 0)
    routing = router(x.unsqueeze(0), torch.tensor([True]))
    assert [float(loss) for loss in losses_of(routing)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)
    collapsed = router(x[:1].expand(1, 8, 8), torch.tensor([True]))  # 2 of 8 experts, 2 of 4 groups
    assert [float(loss) for loss in losses_of(collapsed)] == pytest.approx([4.0, 2.0, 2.0], abs=1e-2)


@pytest.mark.parametrize("weights", [(0.5, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.2), (0.1, 0.2, 0.3)])
def test_a_tape_starts_the_backward_with_the_weight_of_each_loss(weights: tuple[float, float, float]) -> None:
    config = small_config(**V2)
    router, plain, x = make(config), make(config), inputs(config)
    terms = zip(weights, losses_of(plain(x, all_valid(x))), strict=True)
    sum(weight * loss for weight, loss in terms).backward()
    tape = Tape()
    tape.phase("attention")
    cut = router(x, all_valid(x)).cut(tape, BalanceWeights(*weights))
    assert not any(loss.requires_grad for loss in losses_of(cut))
    run(tape.backward(None, WeightQueue(), None))
    assert relative_error(router.weight.grad, plain.weight.grad) < 1e-5


def literal_drops(config: ModelConfig, affinity: list[list[float]], chosen: list[list[int]], factor: float) -> set:
    """Pairs (token, expert) of one sequence that are beyond their group's budget: V2 §2.2.4."""
    size, dropped = config.n_routed_experts // config.n_group, set()
    budget = math.ceil(round(factor * len(chosen) * config.num_experts_per_tok / config.n_group, 9))
    for group in range(config.n_group):
        pairs = [(t, i) for t, token in enumerate(chosen) for i in token if i // size == group]
        pairs.sort(key=lambda pair: affinity[pair[0]][pair[1]], reverse=True)
        dropped |= set(pairs[budget:])
    return dropped


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 1.5, 10.0])
@pytest.mark.parametrize("name", ["V2", "plain", "V3"])
def test_the_pairs_of_lowest_affinity_beyond_a_groups_budget_are_dropped(name: str, factor: float) -> None:
    config = small_config(**ROUTERS[name])
    router, x = make(config), inputs(config)
    exempt = torch.tensor([False, True, False, False])
    scores = literal_scores(config, x.double(), router.weight.detach().double())
    choices = literal_choices(router, scores)
    whole, routing = router(x, all_valid(x)), router(x, all_valid(x), Dropping(factor, exempt))
    ids = routing.expert_ids.view(4, 17, -1).tolist()
    total = 0
    for b in range(4):
        dropped = set() if exempt[b] else literal_drops(config, scores[b].tolist(), choices[b], factor)
        kept = [sorted(i for i in token if (t, i) not in dropped) for t, token in enumerate(choices[b])]
        assert [sorted(i for i in token if i >= 0) for token in ids[b]] == kept
        total += len(dropped)
    assert routing.dropped == total
    assert total > 0 or factor > 1.1
    gone = routing.expert_ids < 0
    assert torch.equal(routing.weights, whole.weights.masked_fill(gone, 0.0)), "the gates of the others stay"
    assert torch.equal(routing.expert_ids, whole.expert_ids.masked_fill(gone, -1))
    assert torch.equal(routing.counts, whole.counts)
    assert all(torch.equal(a, b) for a, b in zip(losses_of(routing), losses_of(whole), strict=True))


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_dropped_tokens_do_not_depend_on_how_sequences_are_split(sizes: tuple[int, ...]) -> None:
    config = small_config(**V2)
    router, x, exempt = make(config), inputs(config), torch.tensor([False, True, False, False])
    together = router(x, all_valid(x), Dropping(1.0, exempt))
    parts = [
        router(piece, all_valid(piece), Dropping(1.0, mask))
        for piece, mask in zip(x.split(sizes), exempt.split(sizes), strict=True)
    ]
    assert torch.equal(torch.cat([part.expert_ids for part in parts]), together.expert_ids)
    assert sum(int(part.dropped) for part in parts) == int(together.dropped) > 0


def test_padding_counts_no_drops_and_dropped_gates_get_no_gradient() -> None:
    config = small_config(**V2)
    router, x, none = make(config), inputs(config), torch.zeros(4, dtype=torch.bool)
    assert router(x, none, Dropping(1.0, none)).dropped == 0
    routing = router(x, all_valid(x), Dropping(0.2, none))
    expected = make(config)
    whole = expected(x, all_valid(x))
    (whole.weights * (routing.expert_ids >= 0)).square().sum().backward()
    routing.weights.square().sum().backward()
    assert torch.equal(router.weight.grad, expected.weight.grad)


def test_budget_is_exact_for_decimal_factors() -> None:
    """In floating point 0.1 x 3 is above 0.3, which must not give one pair more."""
    assert [Dropping(f, torch.zeros(1)).budget(30, 3) for f in (1.0, 1.1, 0.3, 1.01)] == [10, 11, 3, 11]
