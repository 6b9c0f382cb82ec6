"""Reference of the network, literal and slow: FP64, token by token, head by head, expert by expert.

The equations are those of the DeepSeek-V3 report. From `counterflow.model` only the configuration and the tensors'
names are used. YaRN is left to the comparison with transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.model.config import ModelConfig

Weights = dict[str, Tensor]


@dataclass
class TokenRouting:
    """Choice of one token: its experts and their gate weights, and its affinity to every expert."""

    experts: list[int]
    gates: list[Tensor]
    scores: Tensor


@dataclass
class Reference:
    """Sums over valid sequences, as `Output`; `counts` has a list for each MoE layer."""

    loss: Tensor
    mtp_losses: list[Tensor]
    balance: Tensor
    counts: list[list[int]]


def run(config: ModelConfig, weights: Weights, tokens: Tensor, valid: list[bool]) -> Reference:
    """Run tokens `[B, S+1+D]`, without the invalid sequences.

    `weights` has global tensors and router biases by name. Depth k of multi-token prediction uses `embedding@k` and
    `head@k` if there are any; this separates the gradients of the shared tensors' uses.
    """
    assert config.rope_scaling is None
    depth = config.num_nextn_predict_layers
    length = tokens.shape[1] - 1 - depth
    zero = torch.zeros((), dtype=torch.float64)
    result = Reference(zero, [zero] * depth, zero, [])
    for sequence in tokens[torch.tensor(valid)]:
        routings: list[list[TokenRouting]] = []
        x = weights["embedding"][sequence[:length]]
        for layer in range(config.num_hidden_layers):
            x = _block(config, weights, f"layers.{layer}", config.is_moe(layer), x, routings)
        hidden = _norm(x, weights["norm"])
        result.loss = result.loss + _cross_entropy(hidden, weights["head"], sequence[1 : length + 1])
        for k in range(1, depth + 1):
            name = f"mtp.{k - 1}"
            embedded = weights.get(f"embedding@{k}", weights["embedding"])[sequence[k : length + k]]
            joined = (_norm(embedded, weights[f"{name}.embedding_norm"]), _norm(hidden, weights[f"{name}.hidden_norm"]))
            x = torch.cat(joined, -1) @ weights[f"{name}.project"].T
            x = _block(config, weights, f"{name}.block", True, x, routings)
            hidden = _norm(x, weights[f"{name}.norm"])
            labels = sequence[k + 1 : length + k + 1]
            head = weights.get(f"head@{k}", weights["head"])
            result.mtp_losses[k - 1] = result.mtp_losses[k - 1] + _cross_entropy(hidden, head, labels)
        result.balance = result.balance + sum(balance_of_sequence(config, layer) for layer in routings)
        counts = [count_tokens(config, layer) for layer in routings]
        before = result.counts or [[0] * config.n_routed_experts] * len(counts)
        result.counts = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, counts, strict=True)]
    return result


def route_token(config: ModelConfig, logits: Tensor, bias: Tensor) -> TokenRouting:
    """Routing of one token by V3 equations 12-16, node-limited: logits and bias `[E]`."""
    scores = 1 / (1 + torch.exp(-logits))
    biased = (scores.detach() + bias).tolist()
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]

    def worth(group: range) -> float:
        return sum(sorted((biased[i] for i in group), reverse=True)[:2])

    open_groups = sorted(groups, key=worth, reverse=True)[: config.topk_group]
    candidates = [i for group in open_groups for i in group]
    chosen = sorted(candidates, key=lambda i: biased[i], reverse=True)[: config.num_experts_per_tok]
    total = sum(scores[i] for i in chosen) if config.norm_topk_prob else 1.0
    return TokenRouting(chosen, [scores[i] / total * config.routed_scaling_factor for i in chosen], scores)


def balance_of_sequence(config: ModelConfig, routed: list[TokenRouting]) -> Tensor:
    """Balance loss of one sequence by V3 equations 17-20, without alpha."""
    length, experts, top_k = len(routed), config.n_routed_experts, config.num_experts_per_tok
    total = torch.zeros((), dtype=torch.float64)
    best = []
    for token in routed:
        scores = token.scores.tolist()
        best.append(sorted(range(experts), key=lambda i: scores[i], reverse=True)[:top_k])
    for i in range(experts):
        f = experts / (top_k * length) * sum(i in choice for choice in best)
        p = sum(token.scores[i] / token.scores.sum() for token in routed) / length
        total = total + f * p
    return total


def count_tokens(config: ModelConfig, routed: list[TokenRouting]) -> list[int]:
    """Number of tokens that each expert received."""
    return [sum(i in token.experts for token in routed) for i in range(config.n_routed_experts)]


def _cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head.T, labels, reduction="sum")


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def _block(
    config: ModelConfig, weights: Weights, name: str, is_moe: bool, x: Tensor, routings: list[list[TokenRouting]]
) -> Tensor:
    x = x + _attention(config, weights, f"{name}.attention", _norm(x, weights[f"{name}.attention_norm"]))
    normed = _norm(x, weights[f"{name}.mlp_norm"])
    if not is_moe:
        return x + _feed_forward(weights, f"{name}.mlp", normed)
    logits = normed @ weights[f"{name}.mlp.gate"].T
    routed = [route_token(config, token, weights[f"{name}.mlp.gate.bias"]) for token in logits]
    routings.append(routed)
    outputs = []
    for token, choice in zip(normed, routed, strict=True):
        parts = [
            gate * _feed_forward(weights, f"{name}.mlp.experts.{expert}", token)
            for expert, gate in zip(choice.experts, choice.gates, strict=True)
        ]
        if config.n_shared_experts:
            parts.append(_feed_forward(weights, f"{name}.mlp.shared", token))
        outputs.append(sum(parts))
    return x + torch.stack(outputs)


def _feed_forward(weights: Weights, name: str, x: Tensor) -> Tensor:
    return (F.silu(x @ weights[f"{name}.w1"].T) * (x @ weights[f"{name}.w3"].T)) @ weights[f"{name}.w2"].T


def _rotate(config: ModelConfig, x: Tensor) -> Tensor:
    """Neighbouring pairs of x `[S, R]` as complex numbers, rotated by position times frequency."""
    width = x.shape[-1]
    rotated = []
    for position, row in enumerate(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())):
        angles = [position * config.rope_theta ** (-2 * j / width) for j in range(width // 2)]
        rotated.append(row * torch.polar(torch.ones(width // 2, dtype=torch.float64), torch.tensor(angles).double()))
    return torch.view_as_real(torch.stack(rotated)).flatten(1)


def _attention(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if config.q_lora_rank is None:
        queries = x @ weights[f"{name}.q_proj"].T
    else:
        latent = _norm(x @ weights[f"{name}.q_down"].T, weights[f"{name}.q_norm"])
        queries = latent @ weights[f"{name}.q_up"].T
    down = x @ weights[f"{name}.kv_down"].T
    keys_values = _norm(down[:, : config.kv_lora_rank], weights[f"{name}.kv_norm"]) @ weights[f"{name}.kv_up"].T
    shared_key = _rotate(config, down[:, config.kv_lora_rank :])
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    heads = []
    for head in range(config.num_attention_heads):
        query = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        key_value = keys_values[:, head * (nope + v) : (head + 1) * (nope + v)]
        scores = query[:, :nope] @ key_value[:, :nope].T + _rotate(config, query[:, nope:]) @ shared_key.T
        scores = (scores / math.sqrt(nope + rope)).masked_fill(future, float("-inf"))
        heads.append(torch.softmax(scores, -1) @ key_value[:, nope:])
    return torch.cat(heads, -1) @ weights[f"{name}.out"].T
