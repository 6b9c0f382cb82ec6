"""Auxiliary losses that keep a router balanced: over experts, over devices and over the tokens sent to devices.

B sequences, S tokens of a sequence, E experts, K top-k, D groups of experts, each the share of a device or node.
All losses are per sequence (V3 §2.1.2, V2 §2.2.3), so they depend neither on the layout nor on the micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BalanceWeights(NamedTuple):
    """Factors with which the backward of the losses begins; the losses are sums over sequences."""

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0


class BalanceLosses(NamedTuple):
    """FP32 scalars, each summed over valid sequences, before its weight; perfect balance is 1 per sequence."""

    expert: Tensor
    """`Σ_i f_i P_i` (V3 eq. 17-20, V2 §2.2.3)."""
    device: Tensor
    """`Σ_i f'_i P'_i` over groups (V2 §2.2.3); zero where there is one group."""
    communication: Tensor
    """`Σ_i f''_i P''_i` over groups (V2 §2.2.3); zero where there is one group."""


def balance_losses(
    affinity: Tensor, counted: Tensor, sent: Tensor, valid: Tensor, num_groups: int, most_groups: int
) -> BalanceLosses:
    """Return the three losses of one layer.

    `f_i` is E / (K S) times the tokens counted for expert i, `P_i` the mean affinity to expert i. For a group of
    experts, `f'` is the mean of f over its experts, `P'` and `P''` are the sum of P over its experts, and `f''` is
    D / (M S) times the tokens sent to the group.

    Args:
        affinity: FP32 `[B, S, E]`, with sum 1 over the experts of each token. Gradients flow through it alone.
        counted: int64 `[B, S, K]`, the experts for which f counts a token.
        sent: int64 `[B, S, K]`, the experts to which a token was sent, before any was dropped.
        valid: bool `[B]`, False for sequences that are padding.
        num_groups: D.
        most_groups: M, largest number of groups that a token can be sent to.
    """
    length, experts = affinity.shape[1:]
    share = affinity.mean(1)
    chosen = counted.flatten(1)
    hits = torch.zeros_like(share).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=share.dtype))
    load = hits * (experts / (counted.shape[-1] * length))
    expert = _sum(load, share, valid)
    if num_groups == 1:  # f' and P' are 1 for any router
        return BalanceLosses(expert, expert.new_zeros(()), expert.new_zeros(()))
    shares = share.unflatten(1, (num_groups, -1)).sum(-1)
    device = _sum(load.unflatten(1, (num_groups, -1)).mean(-1), shares, valid)
    reached = shares.new_zeros(*affinity.shape[:2], num_groups).scatter_(2, sent // (experts // num_groups), 1.0)
    communication = _sum(reached.mean(1) * (num_groups / most_groups), shares, valid)
    return BalanceLosses(expert, device, communication)


def _sum(load: Tensor, share: Tensor, valid: Tensor) -> Tensor:
    """Sum of `Σ_i load_i share_i` over valid sequences; load and share `[B, …]`."""
    return ((load * share).sum(-1) * valid).sum()
