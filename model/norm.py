"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..weight_gradients import seen_by_autograd, sink_of
from .kernels import Kernels, NormFunction, RMSNormFunction
from .recompute import Saved


class RMSNorm(nn.Module):
    """RMSNorm, `x / rms(x) * gain` over the last dimension. Its output is not kept if the policy recomputes norms."""

    def __init__(self, width: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        total = sink_of(self.gain)
        normed: Tensor = RMSNormFunction.apply(x, seen_by_autograd(self.gain, total, x), self.eps, self.kernels, total)
        saved.rebuild((normed,), lambda: (self._again(x),))
        return normed

    def branch(self, x: Tensor, saved: Saved, users: int = 1, addend: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the residual stream, which is x plus `addend`, and its norm once for each of one to three `users`.

        All are of the shape of x. Give each user a tensor of its own: on GPUs their gradients are then added up by the
        kernel of the norm's backward. On CPUs the tensors are one.
        """
        if not self.kernels.fuse(x):
            total = x if addend is None else x + addend
            return total, *(self(total, saved),) * users
        of_gain = sink_of(self.gain)
        gain = seen_by_autograd(self.gain, of_gain, x)
        total, *normed = NormFunction.apply(x, addend, gain, self.eps, users, of_gain)
        kept = total.detach()
        saved.rebuild((normed[0],), lambda: (self._again(kept),))
        return total, *normed

    def _again(self, x: Tensor) -> Tensor:
        """The norm of x, without a graph."""
        return self.kernels.rms_norm(x.flatten(0, -2), self.gain, self.eps).view(x.shape)
