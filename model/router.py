"""V3's router: sigmoid affinities, node-limited top-k by biased scores, balance without an auxiliary loss.

Source: V3 §2.1.2, equations 12-20. E experts, K top-k, T tokens, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a micro-batch go, and what the router tells the training loop about it."""

    expert_ids: Tensor
    """`[T, K]` int64, global expert numbers."""
    weights: Tensor
    """`[T, K]` FP32 gate weights."""
    counts: Tensor
    """`[E]` int64, valid tokens sent to each expert."""
    balance: Tensor
    """FP32 scalar, the sequence-wise balance loss summed over valid sequences, before its weight alpha."""


class Router(nn.Module):
    """Scores experts for each token and selects K of them. Computes in FP32 whatever the recipe (V3 §3.3.1)."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # Steers selection only. Moved by the training loop after each step, never by gradients.
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor, valid: Tensor) -> Routing:
        """x `[B, S, H]`, valid `[B]` bool: sequences that are padding are routed but not counted."""
        scores = _GateFunction.apply(x, self.weight).sigmoid()
        expert_ids = self._select(scores.detach().flatten(0, 1))
        weights = scores.flatten(0, 1).gather(1, expert_ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        # Not bincount or valid's own indexing: both wait for a GPU to learn how large their result is.
        counted = valid[:, None, None].expand(*x.shape[:2], expert_ids.shape[-1]).reshape(-1).long()
        counts = counted.new_zeros(self.config.n_routed_experts).scatter_add_(0, expert_ids.flatten(), counted)
        return Routing(expert_ids, weights * self.config.routed_scaling_factor, counts, self._balance(scores, valid))

    def _select(self, scores: Tensor) -> Tensor:
        """Top-k of the biased scores inside the best groups; a group counts by its two best (V3's K / M)."""
        config = self.config
        biased = scores + self.bias
        if config.topk_group < config.n_group:
            grouped = biased.view(-1, config.n_group, config.n_routed_experts // config.n_group)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), -1, sorted=False).values.sum(-1)
            kept = group_scores.topk(config.topk_group, -1, sorted=False).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
            biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, -1, sorted=False).indices

    def _balance(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Sum over valid sequences of `Σ_i f_i P_i` (V3 eq. 17-20); f counts the top-k of the *unbiased* scores."""
        config = self.config
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        share = (scores / scores.sum(-1, keepdim=True)).mean(1)
        best = scores.detach().topk(top_k, -1, sorted=False).indices.flatten(1)
        hits = torch.zeros_like(share).scatter_add_(1, best, torch.ones_like(best, dtype=share.dtype))
        load = hits * (experts / (top_k * scores.shape[1]))
        return ((load * share).sum(-1) * valid).sum()


class _GateFunction(torch.autograd.Function):
    """`x W^T` in FP32 from an input of any format, which alone is saved: x `[B, S, H]`, weight `[E, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_weight = grads[0].flatten(0, 1).t() @ x.flatten(0, 1).float()
        return (grads[0] @ weight.float()).to(x.dtype), grad_weight.to(weight.dtype)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """Move each expert's bias by `speed` against its load over the whole global batch (V3 §2.1.2).

    bias `[..., E]` FP32, in place; counts `[..., E]`, summed over every rank and micro-batch of the step.
    """
    load = counts.double()
    bias.add_((load.mean(-1, keepdim=True) - load).sign().to(bias.dtype), alpha=speed)
