"""Token dropping: of each sequence a group of experts computes no more than its budget (V2 §2.2.4).

V2 gives each device the average computational budget (capacity factor 1.0) and drops the tokens of lowest affinity on
each device. The paper does not say over which tokens the average is taken. Here it is taken over each sequence
separately, and a device is one of the model's groups of experts, whichever ranks hold them. The dropped tokens
therefore depend neither on the layout nor on the micro-batch. B sequences, S tokens of a sequence, K top-k, D groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropping:
    """Budget of the groups of experts, and the sequences of a micro-batch that are exempt from it."""

    capacity_factor: float
    """Budget of a group, relative to the (token, expert) pairs that it would get in perfect balance."""
    exempt: Tensor
    """`[B]` bool: sequences that lose no token. V2 exempts about 10 % of the training sequences."""

    def budget(self, pairs: int, num_groups: int) -> int:
        """Number, rounded up, of the `pairs` = S K (token, expert) pairs of a sequence that each group computes."""
        return math.ceil(Fraction(repr(self.capacity_factor)) * pairs / num_groups)

    def beyond(self, affinity: Tensor, groups: Tensor, num_groups: int) -> Tensor:
        """Pairs to drop: bool `[B, S K]`.

        affinity `[B, S K]`: of each pair's token to its expert. groups int64 `[B, S K]`: of each pair's expert. The
        pairs of highest affinity stay; among equal pairs the first.
        """
        budget = self.budget(affinity.shape[1], num_groups)
        order = affinity.argsort(stable=True, dim=1, descending=True)
        order = order.gather(1, groups.gather(1, order).argsort(stable=True, dim=1))  # by group, then by affinity
        sizes = groups.new_zeros(groups.shape[0], num_groups).scatter_add_(1, groups, torch.ones_like(groups))
        first = (sizes.cumsum(1) - sizes).gather(1, groups.gather(1, order))
        rank_in_group = torch.arange(groups.shape[1], device=groups.device) - first
        dropped = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, rank_in_group >= budget)
        return dropped & ~self.exempt.unsqueeze(1)
