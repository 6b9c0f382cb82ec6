"""Linear layers. Models use these and never name a number format: what they compute in follows from the recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`y = x W^T` without bias: x `[..., in]`, weight `[out, in]`, y `[..., out]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class GroupedLinear(nn.Module):
    """One Linear an expert over rows sorted by expert: x `[R, in]`, weight `[E, out, in]`, y `[R, out]`.

    `offsets` `[E]` int32 are the ends of the experts' rows in `x`: expert e owns rows `offsets[e-1]:offsets[e]`.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.transpose(-2, -1), offs=offsets)
