"""Memory-bound kernels of the model, each with its backward written out.

Kernels are plain functions of tensors. `Kernels` holds them either unchanged or fused by `torch.compile`; the autograd
Functions below call the kernels of their model. Statistics and products of the backward are FP32, so results in BF16
are rounded once, at the end.

Shapes: T tokens, H width of the last dimension, R routed rows, I inner width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fp8.kept import Kept


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of the last dimension, FP32 `[..., 1]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm * norm / x.shape[-1] + eps).rsqrt()


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return (x.float() * _reciprocal_rms(x, eps) * gain.float()).to(x.dtype)


def _rms_norm_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd, wide_gain, wide_grad = _reciprocal_rms(x, eps), gain.float(), grad.float()
    normed = x.float() * rstd
    product = wide_grad * normed
    along = (product @ wide_gain).unsqueeze(-1) / x.shape[-1]
    grad_x = (wide_grad * wide_gain).addcmul_(normed, along, value=-1.0).mul_(rstd)
    return grad_x.to(x.dtype), product.sum(0)


def _swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    hidden = F.silu(gate) * up
    return (hidden if weights is None else hidden * weights.unsqueeze(-1)).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    gate, up = gate_up.float().chunk(2, -1)
    wide_grad, grad_weights = grad.float(), None
    grad_up, grad_silu = wide_grad * F.silu(gate), wide_grad * up
    if weights is not None:
        grad_weights = (grad_up * up).sum(-1)
        factor = weights.unsqueeze(-1)
        grad_up, grad_silu = grad_up * factor, grad_silu * factor
    return torch.cat((torch.ops.aten.silu_backward(grad_silu, gate), grad_up), -1).to(gate_up.dtype), grad_weights


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Multiply neighbouring pairs of x `[..., R]`, read as complex numbers, by `rotary` complex64 `[..., R/2]`."""
    # FP32 is copied too: a slice of odd width cannot be viewed as complex numbers.
    pairs = torch.view_as_complex(x.to(torch.float32, copy=True).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


BLOCK_ELEMENTS = 2**18  # FP32 temporaries of 1 MiB: they stay in the cache


def _by_rows(
    kernel: Callable[..., tuple[Tensor | None, ...]], rows: tuple[Tensor | None, ...], *rest: Any, summed: int = 0
) -> tuple[Any, ...]:
    """Run a kernel on a CPU a block of rows at a time, so that its temporaries never leave the cache.

    Every operand in `rows` and every result has one row per row of the input, except the last `summed` results, which
    are added up in FP32. Temporaries of the whole input would be mapped and unmapped by the system every time: on one
    busy core, 2048 x 512 BF16, RMSNorm's backward was seen to take 3.5 ms instead of 22 ms.
    """
    first = rows[0]
    assert first is not None
    count = first.shape[0]
    block = max(1, BLOCK_ELEMENTS // max(1, first.shape[-1])) if first.device.type == "cpu" else count
    if count <= block:
        return kernel(*rows, *rest)
    results: list[Tensor | None] = []
    for start in range(0, count, block):
        part = slice(start, start + block)
        of_block = kernel(*(None if x is None else x[part] for x in rows), *rest)
        if not results:
            by_row = len(of_block) - summed
            results = [
                None if x is None else x if i >= by_row else x.new_empty(count, *x.shape[1:])
                for i, x in enumerate(of_block)
            ]
        for i, x in enumerate(of_block):
            whole = results[i]
            if x is None or whole is None:
                continue
            if i < by_row:
                whole[part] = x
            elif start:
                whole += x
    return tuple(results)


@dataclass(frozen=True)
class Kernels:
    """Kernels of a model, on operands with one row per token; `make(compile=True)` fuses each with torch.compile."""

    rms_norm: Callable[..., Tensor]
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor | None]]

    @classmethod
    def make(cls, compile: bool = False) -> Kernels:
        if compile:
            fuse = partial(torch.compile, dynamic=True)
            return cls(fuse(_rms_norm), fuse(_rms_norm_backward), fuse(_swiglu), fuse(_swiglu_backward))
        return cls(
            lambda x, gain, eps: _by_rows(lambda *a: (_rms_norm(*a),), (x,), gain, eps)[0],
            lambda grad, x, gain, eps: _by_rows(_rms_norm_backward, (grad, x), gain, eps, summed=1),
            lambda gate_up, weights: _by_rows(lambda *a: (_swiglu(*a),), (gate_up, weights))[0],
            lambda grad, gate_up, weights: _by_rows(_swiglu_backward, (grad, gate_up, weights)),
        )


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that saves only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps, ctx.kernels = eps, kernels
        return kernels.rms_norm(_rows(x), gain, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gain = ctx.saved_tensors
        grad_x, grad_gain = ctx.kernels.rms_norm_backward(_rows(grads[0]), _rows(x), gain, ctx.eps)
        return grad_x.view(x.shape), grad_gain.to(gain.dtype), None, None


class SwiGLUFunction(torch.autograd.Function):
    """SwiGLU, `silu(gate) * up`, times the routing weight of each row if there are weights.

    gate_up [..., 2I] (gate first), weights [R] FP32 or None, result [..., I]. As in V3, the gate weight is applied
    here, so that combining is a plain sum and the weight's gradient needs no saved expert output. `kept` is saved in
    place of gate_up: the backward computes with the values that it restores (V3 §3.3.3).
    """

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, weights: Tensor | None, kernels: Kernels, kept: Kept | None = None
    ) -> Tensor:
        kept = kept or Kept((gate_up,), lambda gate_up: gate_up)
        ctx.save_for_backward(*kept.tensors, weights)
        ctx.kernels, ctx.restore = kernels, kept.restore
        return swiglu(gate_up, weights, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *kept, weights = ctx.saved_tensors
        gate_up = ctx.restore(*kept)
        grad_gate_up, grad_weights = ctx.kernels.swiglu_backward(_rows(grads[0]), _rows(gate_up), weights)
        return grad_gate_up.view(gate_up.shape), grad_weights, None, None


def swiglu(gate_up: Tensor, weights: Tensor | None, kernels: Kernels) -> Tensor:
    """Forward of `SwiGLUFunction`."""
    return kernels.swiglu(_rows(gate_up), weights).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class AssembleFunction(torch.autograd.Function):
    """Rotation and layout of queries, keys and values for attention.

    In: query `[B, S, A, N+R]`, keys and values `[B, S, A, N+V]`, the one rotary key `[B, S, R]` that all heads share,
    rotary `[S, R/2]` complex. Out, heads before positions (in memory only on CPUs, see `_by_head`): query
    `[B, A, S, N+R]` times `scale`, key `[B, A, S, N+R]`, value `[B, A, S, V]` (A heads, N plain width, R rotated width,
    V value width). The Function saves no activation.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = query.shape[-1]
        plain = width - rotary_key.shape[-1]
        ctx.save_for_backward(rotary)
        ctx.scale, ctx.plain = scale, plain
        out_query, out_key = _by_head(query, width), _by_head(query, width)
        torch.mul(query[..., :plain].transpose(1, 2), scale, out=out_query[..., :plain])
        # A factor of magnitude `scale` rotates and scales in one product.
        out_query[..., plain:] = _rotate(query[..., plain:], rotary[:, None] * scale).transpose(1, 2)
        out_key[..., :plain] = key_value[..., :plain].transpose(1, 2)
        out_key[..., plain:] = _rotate(rotary_key, rotary).unsqueeze(1)
        value = _by_head(key_value, key_value.shape[-1] - plain)
        return out_query, out_key, value.copy_(key_value[..., plain:].transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)  # back to [B, S, A, …]
        (rotary,) = ctx.saved_tensors
        plain, scale, back = ctx.plain, ctx.scale, rotary.conj()
        out_query = grad_query.new_empty(grad_query.shape)
        torch.mul(grad_query[..., :plain], scale, out=out_query[..., :plain])
        out_query[..., plain:] = _rotate(grad_query[..., plain:], back[:, None] * scale)
        out_key_value = torch.cat((grad_key[..., :plain], grad_value), -1)
        shared = grad_key[..., plain:].sum(2, dtype=torch.float32).to(grad_key.dtype)
        return out_query, out_key_value, _rotate(shared, back), None, None


def _by_head(like: Tensor, width: int) -> Tensor:
    """Empty `[B, A, S, width]` for `like` `[B, S, A, …]`: in that order on CPUs, where attention multiplies matrices
    per head; elsewhere in the order of `like`, in which the kernels of GPUs read it."""
    batch, length, heads, _ = like.shape
    if like.device.type == "cpu":
        return like.new_empty(batch, heads, length, width)
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


class EmbeddingFunction(torch.autograd.Function):
    """Rows of `table` `[V, H]` by `tokens` `[B, S]`, with the gradients of a row summed in FP32 and rounded once.

    PyTorch's CPU kernel sums them in the table's format: a frequent token's BF16 sum stops growing at 256 times its
    addends. PyTorch's CUDA kernel sums in FP32 already, and is used on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (tokens,) = ctx.saved_tensors
        if tokens.device.type != "cpu":
            return None, torch.ops.aten.embedding_dense_backward(grads[0], tokens, ctx.rows, -1, False)
        total = torch.zeros(ctx.rows, grads[0].shape[-1], dtype=torch.float32)
        total.index_add_(0, tokens.flatten(), grads[0].flatten(0, -2).float())
        return None, total.to(ctx.dtype)
