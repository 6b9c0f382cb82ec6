"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import Kernels, RMSNormFunction
from .recompute import Saved


class RMSNorm(nn.Module):
    """RMSNorm, `x / rms(x) * gain` over the last dimension. Its output is not kept if the policy recomputes norms."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        def normalise() -> Tensor:
            return RMSNormFunction.apply(x, self.gain, self.eps, self.kernels)

        normed = normalise()
        saved.rebuild((normed,), lambda: (normalise(),))
        return normed
