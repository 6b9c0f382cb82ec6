"""Weight gradients added to their FP32 sum by the matrix product itself: no rounding to BF16, and no tensor between.

On a GPU cuBLAS multiplies BF16, sums in FP32 and adds to FP32, as DeepSeek-V3 accumulates its weight gradients. torch
has this product since 2.11, `addmm` with `out_dtype`; its meta kernel came later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import fused


def _gpu(total: Tensor, dy: Tensor, x: Tensor, factor: float) -> None:
    if dy.dtype == total.dtype:
        total.addmm_(dy.t(), x, alpha=factor)
    else:
        torch.addmm(total, dy.t(), x, alpha=factor, out_dtype=total.dtype, out=total)


def _formula(total: Tensor, dy: Tensor, x: Tensor, factor: float) -> None:
    total.addmm_(dy.t().to(total.dtype), x.to(total.dtype), alpha=factor)


def _shapes(total: Tensor, dy: Tensor, x: Tensor, factor: float) -> None:
    assert total.shape == (dy.shape[1], x.shape[1]) and dy.shape[0] == x.shape[0] and dy.dtype == x.dtype


add_product = fused("add_product(Tensor(a!) total, Tensor dy, Tensor x, float factor) -> ()", _gpu, _formula, _shapes)
"""`add_product(total, dy, x, factor)` adds `factor dy^T x` to `total` `[N, K]` FP32; dy `[T, N]`, x `[T, K]`."""
