"""Routers: V3's (biased, node-limited), V2's (device-limited) and plain top-k, over sigmoid or softmax affinities.

`model.topk_method` and `model.scoring_func` name them as Hugging Face does:

    noaux_tc               V3 §2.1.2, eq. 12-20: top-k of biased scores in the best groups, by their two best experts
    group_limited_greedy   V2 §2.2.2: top-k of the scores in the best groups, by their best expert
    greedy                 top-k of the scores

E experts, K top-k, T tokens, B sequences, S tokens of a sequence, D groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..differentiable import Function, once_differentiable
from ..kernels.add_product import add_product
from ..kernels.gate import Gate, gate, gate_backward, gate_balance
from ..phases import Tape, Uncut
from ..weight_gradients import GradientSum, seen_by_autograd, sink_of
from .balance import BalanceLosses, BalanceWeights, balance_losses
from .capacity import Dropping
from .config import ModelConfig
from .kernels import on_gpu


@dataclass(frozen=True)
class Routing:
    """Experts of a micro-batch's tokens, and the router's statistics and losses for the training step."""

    expert_ids: Tensor
    """`[T, K]` int64, global expert numbers; -1 for a pair that was dropped and is sent nowhere."""
    weights: Tensor
    """`[T, K]` FP32 gate weights, 0 for a pair that was dropped."""
    counts: Tensor
    """`[E]` int64, valid tokens that chose each expert, dropped ones included."""
    dropped: Tensor
    """int64 scalar, (token, expert) pairs of valid sequences that were dropped."""
    balance: Tensor
    """FP32 scalar, the balance loss over experts summed over valid sequences, before its weight alpha."""
    device: Tensor
    """FP32 scalar, the balance loss over groups of experts, likewise; 0 with one group."""
    communication: Tensor
    """FP32 scalar, the balance loss over tokens sent to groups, likewise; 0 with one group."""

    def cut(self, tape: Uncut | Tape, weights: BalanceWeights) -> Routing:
        """Routing for the phases after the router. The graph of the losses ends here; `weights` start its backward."""
        balance, device, communication = tape.seed(self.balance, weights.expert), self.device, self.communication
        if weights.device:
            device = tape.seed(device, weights.device)
        if weights.communication:
            communication = tape.seed(communication, weights.communication)
        if isinstance(tape, Tape):
            device, communication = device.detach(), communication.detach()
        return replace(
            self, weights=tape.cut(self.weights), balance=balance, device=device, communication=communication
        )


Selection = Callable[[Tensor], Tensor]
"""Experts `[T, K]` of tokens, chosen by the tokens' scores `[T, E]` without the bias."""


class Router(nn.Module):
    """Router that scores experts for each token and selects K of them, in FP32 whatever the recipe (V3 §3.3.1)."""

    bias: Tensor | None
    """`[E]` FP32, None if `topk_method` has none. The bias affects selection only, and is moved by `update_bias` after
    each step, never by gradients."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        zeros = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("bias", zeros)
        self.selection: Selection | None = None
        """Replacement for the router's own `select`, set if the experts of the tokens come from outside."""
        by_groups, biased = config.limits_groups, config.topk_method == "noaux_tc"
        self.rules = Gate(
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            open_groups=config.topk_group if by_groups else 0,
            softmax=config.scoring_func == "softmax",
            paired=biased,
            apart=biased,
            normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
            most_groups=self._most_groups,
        )

    def forward(self, x: Tensor, valid: Tensor, dropping: Dropping | None = None) -> Routing:
        """Route x `[B, S, H]`, valid `[B]` bool: sequences that are padding are routed but not counted.

        Without `dropping` every token reaches its K experts. Dropping changes neither counts nor losses nor the gate
        weights of the pairs that stay.
        """
        if on_gpu(x) and self.selection is None and dropping is None:
            return self._fused(x, valid)
        scores = self.scores(x)
        expert_ids = (self.selection or self.select)(scores.detach().flatten(0, 1))
        weights = scores.flatten(0, 1).gather(1, expert_ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        # No bincount and no indexing by `valid`: both make the host wait for the size of a GPU's result.
        counted = valid[:, None, None].expand(*x.shape[:2], expert_ids.shape[-1]).reshape(-1).long()
        counts = counted.new_zeros(self.config.n_routed_experts).scatter_add_(0, expert_ids.flatten(), counted)
        losses, dropped = self._balance(scores, expert_ids, valid), counts.new_zeros(())
        if dropping is not None:
            beyond = self._beyond_budget(scores.detach(), expert_ids, dropping)
            dropped = (beyond.flatten() * counted).sum()
            expert_ids, weights = expert_ids.masked_fill(beyond, -1), weights.masked_fill(beyond, 0.0)
        return Routing(expert_ids, weights, counts, dropped, losses.expert, losses.device, losses.communication)

    def _fused(self, x: Tensor, valid: Tensor) -> Routing:
        total = sink_of(self.weight)
        weight = seen_by_autograd(self.weight, total, x)
        ids, weights, counts, *losses = _FusedFunction.apply(x, weight, self.bias, valid, astuple(self.rules), total)
        return Routing(ids, weights, counts[:-1], counts[-1], *losses)

    def scores(self, x: Tensor) -> Tensor:
        """Affinities FP32 `[B, S, E]` of tokens x `[B, S, H]`."""
        total = sink_of(self.weight)
        logits: Tensor = _GateFunction.apply(x, seen_by_autograd(self.weight, total, x), total)
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    def biased(self, scores: Tensor) -> Tensor:
        """Scores `[…, E]` by which experts are selected."""
        return scores if self.bias is None else scores + self.bias

    def worth(self, grouped: Tensor) -> Tensor:
        """Scores `[…, D]` by which groups are selected, from their experts' biased scores `[…, D, E / D]`."""
        if self.config.topk_method == "noaux_tc":  # the K / M = 2 best
            return grouped.topk(min(2, grouped.shape[-1]), -1, sorted=False).values.sum(-1)
        return grouped.amax(-1)

    def select(self, scores: Tensor) -> Tensor:
        """Top-k `[T, K]` of the biased scores, inside the best groups if the config limits groups."""
        config = self.config
        biased = self.biased(scores)
        if config.limits_groups:
            grouped = biased.view(-1, config.n_group, config.n_routed_experts // config.n_group)
            worth = self.worth(grouped)
            kept = worth.topk(config.topk_group, -1, sorted=False).indices
            closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
            biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(config.num_experts_per_tok, -1, sorted=False).indices

    def _balance(self, scores: Tensor, expert_ids: Tensor, valid: Tensor) -> BalanceLosses:
        """Balance losses. V3's f counts the top-k of the *unbiased* scores over all experts (eq. 18), V2's f the
        selected experts."""
        config = self.config
        sent = expert_ids.view(*scores.shape[:2], -1)
        counted = sent
        if config.topk_method == "noaux_tc":
            counted = scores.detach().topk(config.num_experts_per_tok, -1, sorted=False).indices
        affinity = scores / scores.sum(-1, keepdim=True) if config.scoring_func == "sigmoid" else scores
        return balance_losses(affinity, counted, sent, valid, config.n_group, self._most_groups)

    @property
    def _most_groups(self) -> int:
        """Largest number of groups that a token can be sent to."""
        config = self.config
        return min(config.n_group, config.num_experts_per_tok) if config.topk_method == "greedy" else config.topk_group

    def _beyond_budget(self, scores: Tensor, expert_ids: Tensor, dropping: Dropping) -> Tensor:
        """Pairs to drop, bool `[T, K]`, by the affinities `[B, S, E]` without the bias."""
        experts, groups = self.config.n_routed_experts, self.config.n_group
        pairs = expert_ids.view(scores.shape[0], -1)
        affinity = scores.gather(2, expert_ids.view(*scores.shape[:2], -1)).flatten(1)
        return dropping.beyond(affinity, pairs // (experts // groups), groups).view_as(expert_ids)


class _GateFunction(Function):
    """Product `x W^T` in FP32 from operands of any format, saved in that format: x `[B, S, H]`, weight `[E, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: GradientSum | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.total = weight, total
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad, rows, total, grad_weight = grads[0].flatten(0, 1), x.flatten(0, 1).float(), ctx.total, None
        if total is None:
            grad_weight = (grad.t() @ rows).to(weight.dtype)
        elif x.device.type == "cpu":
            total.add((grad.t() @ rows).to(weight.dtype))
        else:
            add_product(total.buffer, grad, rows, 1.0)
            total.arrived()
        return (grads[0] @ weight.float()).to(x.dtype), grad_weight, None


class _FusedFunction(Function):
    """The whole router on GPUs: logits in FP32 from operands of any format, then `kernels/gate.py`.

    BF16 operands are multiplied as they are: tensor cores multiply BF16 exactly and sum in FP32. For the backward the
    logits' gradient is split into two BF16 numbers, 16 bits of it together, so that no product is of FP32 numbers,
    which take ten times as long, and no operand is copied to FP32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        valid: Tensor,
        rules: tuple[Any, ...],
        total: GradientSum | None,
    ) -> tuple[Tensor, ...]:
        logits = _in_fp32(x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)
        ids, weights, *sums = gate(logits, bias, *rules)
        counts, losses, pulls = gate_balance(*sums, valid, x.shape[1], *rules)
        ctx.save_for_backward(x, weight, logits, ids, pulls)
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)
        ctx.rules, ctx.total = rules, total
        return (ids, weights, counts, *losses.unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, weight, logits, ids, pulls = ctx.saved_tensors
        experts, rows, halves = weight.shape[0], x.flatten(0, 1), x.dtype == torch.bfloat16
        grad = gate_backward(grads[1], list(grads[3:]), logits, ids, pulls, halves, *ctx.rules)
        if halves:
            grad_x = grad @ torch.cat((weight, weight))
        else:
            rows, grad_x = rows.float(), (grad @ weight.float()).to(x.dtype)
        parts, grad_weight = grad.split(experts, 1), None
        if ctx.total is None:
            grad_weight = torch.stack([_in_fp32(part.t(), rows) for part in parts]).sum(0).to(weight.dtype)
        else:
            for part in parts:
                add_product(ctx.total.buffer, part, rows, 1.0)
            ctx.total.arrived()
        return grad_x.view(x.shape), grad_weight, None, None, None, None


def _in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Product in FP32 of two matrices of one format."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """Move each expert's bias by `speed` against its load over the whole global batch (V3 §2.1.2).

    bias `[..., E]` FP32, in place; counts `[..., E]`, summed over every rank and micro-batch of the step.
    """
    load = counts.double()
    bias.add_((load.mean(-1, keepdim=True) - load).sign().to(bias.dtype), alpha=speed)
