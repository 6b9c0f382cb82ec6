"""SwiGLU whose input is cached in FP8, by fused kernels.

The forward's kernel makes SwiGLU's output and the cache of its input in one pass. The output for W and the gradients
are computed from the cache, without restoring it in memory (V3 §3.3.3).

R rows, I inner width of a feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..differentiable import Function, once_differentiable
from ..fp8.kept import Kept
from ..fp8.operations import swiglu_backward_of, swiglu_columns_of, swiglu_keeping, swiglu_of
from ..fp8.quantize import BlockQuantized
from ..fp8.recipe import Quantizer


def cached_swiglu(gate_up: Tensor, weights: Tensor | None, quantizer: Quantizer) -> tuple[Tensor, Kept]:
    """SwiGLU's output `[..., I]` BF16 of gate_up `[..., 2I]`, and the output's substitute for the backward.

    `weights` FP32 `[R]` are the gate weights of the rows, or None. `quantizer` is that of `one_kernel_cache`.
    """
    assert quantizer.format is not None
    rows, met = gate_up.flatten(0, -2), quantizer.monitor.flag(gate_up.device)
    with torch.no_grad():
        hidden, cache = swiglu_keeping(rows, weights, quantizer.format.pow2, met)
    shape = (*gate_up.shape[:-1], hidden.shape[-1])
    result: Tensor = _CachedSwiGLU.apply(gate_up, weights, hidden.view(shape), cache)
    rest = cache.without_tensors()
    more = () if weights is None else (weights.detach(),)
    return result, Kept(
        (cache.data, cache.scale, *more),
        lambda data, scale, weights=None: swiglu_of(rest(data, scale), weights).view(shape),
        lambda data, scale, weights=None, **how: swiglu_columns_of(rest(data, scale), weights, **how),
    )


class _CachedSwiGLU(Function):
    """The backward of SwiGLU; the forward has run."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None, hidden: Tensor, cache: BlockQuantized) -> Tensor:
        ctx.save_for_backward(cache.data, cache.scale, weights)
        ctx.cache, ctx.shape = cache.without_tensors(), gate_up.shape
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        data, scale, weights = ctx.saved_tensors
        grad, grad_weights = swiglu_backward_of(grads[0].flatten(0, -2), ctx.cache(data, scale), weights)
        return grad.view(ctx.shape), grad_weights, None, None
