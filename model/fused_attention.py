"""Causal attention by PyTorch's fused kernels, with a choice of what stays of the result for the backward.

PyTorch's own autograd saves the result of a fused kernel for the backward. V3 keeps this result as codes, which the
output projection needs too, and its attention restores the result from them. The Function below therefore calls the
kernels itself, and saves what the caller keeps of the result.

cuDNN's kernel takes queries and values of unequal widths. PyTorch's flash attention takes equal widths alone, and its
memory-efficient kernel takes all widths, at a fraction of the speed on Hopper. The meta device counts as a GPU that
has cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..differentiable import Function, once_differentiable
from ..fp8.kept import Kept

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


class Forwarded(NamedTuple):
    """Results of a fused forward."""

    out: Tensor
    """`[B, A, S, V]`"""
    saved: tuple[Tensor | None, ...]
    """Other tensors that the backward needs, such as logsumexp; None where the kernel has none."""
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class FusedKernel:
    """A kernel of torch for attention with a causal mask and scale 1.

    `forward(query, key, value, grad)` makes logsumexp if `grad`. `backward(grad_out, query, key, value, out, saved,
    lengths)` returns the gradients of query, key and value.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool], Forwarded]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    fast: bool = True


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, grad: bool) -> Forwarded:
    out, logsumexp, ends_q, ends_k, length_q, length_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, grad, 0.0, True, False, scale=1.0
    )
    return Forwarded(out, (logsumexp, seed, offset, ends_q, ends_k), (length_q, length_k))


def _cudnn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, saved: Any, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, seed, offset, ends_q, ends_k = saved
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, query, key, value, out, logsumexp, seed, offset, None, ends_q, ends_k, *lengths, 0.0, True), scale=1.0
    )
    return found


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, grad: bool) -> Forwarded:
    out, logsumexp, ends_q, ends_k, length_q, length_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, False, scale=1.0
    )
    return Forwarded(out, (logsumexp, seed, offset, ends_q, ends_k), (length_q, length_k))


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, saved: Any, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, seed, offset, ends_q, ends_k = saved
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
        *(grad, query, key, value, out, logsumexp, ends_q, ends_k, *lengths, 0.0, True, seed, offset), scale=1.0
    )
    return found


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, grad: bool) -> Forwarded:
    out, *saved = aten._scaled_dot_product_efficient_attention(query, key, value, None, grad, 0.0, True, scale=1.0)
    return Forwarded(out, tuple(saved))


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, saved: Any, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    needed = [True, True, True, False]  # no mask, so no gradient of one
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(grad, query, key, value, None, out, *saved, 0.0, needed, True), scale=1.0
    )
    return grad_q, grad_k, grad_v


CUDNN = FusedKernel("cudnn", _cudnn_forward, _cudnn_backward)
FLASH = FusedKernel("flash", _flash_forward, _flash_backward)
EFFICIENT = FusedKernel("efficient", _efficient_forward, _efficient_backward, fast=False)

_chosen: dict[tuple[object, ...], FusedKernel | None] = {}


def choose_kernel(query: Tensor, key: Tensor, value: Tensor) -> FusedKernel | None:
    """The fastest fused kernel that takes these operands; None if none does.

    The answer is kept by device, type, heads and widths. Asking torch makes no host wait.
    """
    asked = query.device, query.dtype, query.shape[1], query.shape[3], value.shape[3], torch.is_grad_enabled()
    if asked not in _chosen:
        _chosen[asked] = _ask_torch(query, key, value)
    return _chosen[asked]


def _ask_torch(query: Tensor, key: Tensor, value: Tensor) -> FusedKernel | None:
    if query.device.type != "cuda":
        return CUDNN if query.dtype in HALF else EFFICIENT
    cuda = torch.backends.cuda
    operands = cuda.SDPAParams(query, key, value, None, 0.0, True, False)
    if cuda.can_use_cudnn_attention(operands):
        return CUDNN
    if query.shape[3] == value.shape[3] and cuda.can_use_flash_attention(operands):
        return FLASH
    return EFFICIENT if cuda.can_use_efficient_attention(operands) else None


def fused_attention(
    kernel: FusedKernel, query: Tensor, key: Tensor, value: Tensor, keep: Callable[[Tensor], Kept | None]
) -> tuple[Tensor, Kept | None]:
    """Attended values `[B, S, A V]` (A heads), and what `keep` makes of them.

    What `keep` returns is saved for the backward, which restores the result from it; the result itself is saved where
    `keep` returns None.
    """
    grad = torch.is_grad_enabled()
    with torch.no_grad():
        made = kernel.forward(query, key, value, grad)
        attended = made.out.transpose(1, 2).flatten(2)
    kept = keep(attended) if grad else None
    if grad:
        attended = _FusedAttention.apply(query, key, value, attended, kernel, made, kept)
    return attended, kept


class _FusedAttention(Function):
    """The backward of `kernel`; the forward has run."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Tensor,
        kernel: FusedKernel,
        made: Forwarded,
        kept: Kept | None,
    ) -> Tensor:
        kept = kept or Kept((attended,), lambda attended: attended)
        ctx.save_for_backward(query, key, value, *made.saved, *kept.tensors)
        ctx.kernel, ctx.restore, ctx.lengths, ctx.others = kernel, kept.restore, made.lengths, len(made.saved)
        return attended.view_as(attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *rest = ctx.saved_tensors
        saved, kept = rest[: ctx.others], rest[ctx.others :]
        heads = query.shape[1]
        grad, out = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (grads[0], ctx.restore(*kept)))
        found = ctx.kernel.backward(grad, query, key, value, out, saved, ctx.lengths)
        return *found, None, None, None, None
