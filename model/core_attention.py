"""Causal attention, after the projections.

On GPUs the kernels of `fused_attention` run, unless they do not take the widths. On CPUs SDPA's kernel runs far below
the speed of matrix multiplication (measured: 78 ms forward and backward where the blocks below take 22 ms, BF16, 32
heads of 512 x 96). The same blockwise algorithm is therefore written with batched GEMMs there. The scores of only one
block of queries exist at a time, and the backward computes them again from queries and keys. Nothing quadratic in the
sequence length is saved. If BF16 products are widened, scores and probabilities are FP32 too, and only results are
rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..differentiable import Function, once_differentiable
from ..fp8.kept import Kept
from ..fp8.products import Products
from ..fp8.recipe import Attention
from .fused_attention import choose_kernel, fused_attention

BLOCK = 128  # queries per block: scores of 32 heads x 128 x 512 in BF16 are 4 MiB and stay in the cache


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Callable[[Tensor], Kept | None],
    library: Attention | None = None,
    products: Products | None = None,
) -> tuple[Tensor, Kept | None]:
    """Result of `causal_attention` as `[B, S, A V]` (A heads), and what `keep` makes of it for the output projection.

    Fused kernels of a GPU restore their result for the backward from what was kept. The recipe's `library` computes
    attention where there is no fast kernel; it saves the result itself.
    """
    kernel = None if query.device.type == "cpu" else choose_kernel(query, key, value)
    if kernel is not None and (kernel.fast or library is None):
        return fused_attention(kernel, query, key, value, keep)
    out = causal_attention(query, key, value, products) if library is None else library(query, key, value)
    attended = out.transpose(1, 2).flatten(2)
    return attended, keep(attended)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, products: Products | None = None) -> Tensor:
    """Softmax attention with a causal mask; the scale is already in the query.

    query and key `[B, A, S, D]`, value `[B, A, S, V]`, result `[B, A, S, V]` (A heads). `products`: how BF16
    products are computed; None is this machine's choice.
    """
    if query.device.type == "cpu":
        return _BlockwiseAttention.apply(query, key, value, (products or Products()).widens(query))
    if query.device.type == "meta":  # SDPA would take the unfused kernel, which no GPU gets
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        shapes: Tensor = attend(query, key, value, None, True, 0.0, True, False, scale=1.0)[0]
        return shapes
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


def _probabilities(query: Tensor, key: Tensor, start: int, stop: int, mask: Tensor) -> Tensor:
    """Attention probabilities [G, stop-start, stop] of one block of queries over the keys up to the block's end."""
    scores = torch.bmm(query[:, start:stop], key[:, :stop].transpose(1, 2))
    scores[:, :, start:] += mask[: stop - start, : stop - start]
    return torch.softmax(scores, -1)


class _BlockwiseAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, widen: bool) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.widen = widen
        q, k, v = (_by_head(x, widen) for x in (query, key, value))
        out = torch.empty(v.shape, dtype=value.dtype)
        for start, stop, mask in _blocks(q):
            out[:, start:stop] = torch.bmm(_probabilities(q, k, start, stop, mask), v[:, :stop])
        return out.view(value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        q, k, v, grad = (_by_head(x, ctx.widen) for x in (query, key, value, grads[0]))
        grad_q = torch.empty_like(q)
        # Several blocks of queries add to the gradient of one key: the sums are FP32 and rounded once.
        grad_k = torch.zeros(k.shape, dtype=torch.float32)
        grad_v = torch.zeros(v.shape, dtype=torch.float32)
        for start, stop, mask in _blocks(q):
            p = _probabilities(q, k, start, stop, mask)
            g = grad[:, start:stop]
            grad_p = torch.bmm(g, v[:, :stop].transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:stop] = torch.bmm(grad_s, k[:, :stop])
            grad_k[:, :stop] += torch.bmm(grad_s.transpose(1, 2), q[:, start:stop])
            grad_v[:, :stop] += torch.bmm(p.transpose(1, 2), g)
        parts = ((grad_q, query), (grad_k, key), (grad_v, value))
        return *(part.to(like.dtype).view(like.shape) for part, like in parts), None


def _by_head(x: Tensor, widen: bool) -> Tensor:
    """x `[B, A, S, D]` as one matrix per head `[G, S, D]`, in FP32 where products are widened."""
    return x.flatten(0, 1).float() if widen else x.flatten(0, 1)


def _blocks(query: Tensor) -> list[tuple[int, int, Tensor]]:
    length = query.shape[1]
    mask = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype).triu_(1)
    return [(start, min(start + BLOCK, length), mask) for start in range(0, length, BLOCK)]
