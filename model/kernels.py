"""The memory-bound kernels of the model, each with its backward written out.

They are plain functions of tensors. `Kernels` holds them either as they are or fused by `torch.compile`; the
autograd Functions below call whichever the model was given. Statistics and products of the backward are FP32, so
BF16 inputs are rounded once at the end.

Shapes: T tokens, H width of the last dimension, R routed rows, I inner width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, eps)


def _rms_norm_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * rstd
    grad32 = grad.float()
    grad_gain = (grad32 * normed).flatten(0, -2).sum(0)
    grad_normed = grad32 * gain
    along = (grad_normed * normed).mean(-1, keepdim=True)
    return ((grad_normed - normed * along) * rstd).to(x.dtype), grad_gain.to(gain.dtype)


def _swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if weights is None else hidden * weights.unsqueeze(-1).to(hidden.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    gate, up = gate_up.chunk(2, -1)
    silu = F.silu(gate)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    grad_weights = None
    if weights is not None:
        grad_weights = torch.linalg.vecdot(grad * silu, up).float()
        grad = grad * weights.unsqueeze(-1).to(grad.dtype)
    torch.mul(grad, silu, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_gate_up, grad_weights


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), … by their position's angle; the result lists first, then second members.

    x [..., D] with neighbouring pairs as DeepSeek stores them, cos and sin broadcastable to [..., D/2].
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


def _rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = grad.float().chunk(2, -1)
    return torch.stack((first * cos + second * sin, second * cos - first * sin), -1).flatten(-2).to(grad.dtype)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model; `make(compile=True)` fuses each by torch.compile."""

    rms_norm: Callable[..., Any] = _rms_norm
    rms_norm_backward: Callable[..., Any] = _rms_norm_backward
    swiglu: Callable[..., Any] = _swiglu
    swiglu_backward: Callable[..., Any] = _swiglu_backward
    rotate: Callable[..., Any] = _rotate
    rotate_backward: Callable[..., Any] = _rotate_backward

    @classmethod
    def make(cls, compile: bool = False) -> Kernels:
        if not compile:
            return cls()
        return cls(**{name: torch.compile(f, dynamic=True) for name, f in vars(cls()).items()})


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that saves its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps, ctx.kernels = eps, kernels
        return kernels.rms_norm(x, gain, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gain = ctx.saved_tensors
        grad_x, grad_gain = ctx.kernels.rms_norm_backward(grads[0], x, gain, ctx.eps)
        return grad_x, grad_gain, None, None


class SwiGLUFunction(torch.autograd.Function):
    """`silu(gate) * up`, times the routing weight of each row where there is one.

    gate_up [R, 2I] (gate first), weights [R] FP32 or None, result [R, I]. V3 multiplies the gate weight in here, so
    that combining is a plain sum and the weight's gradient needs no saved expert output (V3 profile: facts of its
    fused kernel `swiglu_forward_with_weight`).
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate_up, weights = ctx.saved_tensors
        grad_gate_up, grad_weights = ctx.kernels.swiglu_backward(grads[0], gate_up, weights)
        return grad_gate_up, grad_weights, None


class AssembleFunction(torch.autograd.Function):
    """Rotate and lay out queries, keys and values for attention.

    In: query `[B, S, A, N+R]`, keys and values `[B, S, A, N+V]`, the one rotary key `[B, S, R]` that all heads share,
    cos and sin `[S, R/2]`. Out, heads before positions: query `[B, A, S, N+R]` times `scale`, key `[B, A, S, N+R]`,
    value `[B, A, S, V]` (A heads, N plain width, R rotated width, V value width). Saves no activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        rotary_key: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, heads, width = query.shape
        rotated = rotary_key.shape[-1]
        plain = width - rotated
        ctx.save_for_backward(cos, sin)
        ctx.scale, ctx.kernels, ctx.plain = scale, kernels, plain
        out_query = query.new_empty(batch, heads, length, width)
        out_key = torch.empty_like(out_query)
        torch.mul(query[..., :plain].transpose(1, 2), scale, out=out_query[..., :plain])
        # cos and sin times the scale: the rotated part is scaled for free.
        turned = kernels.rotate(query[..., plain:], cos[:, None] * scale, sin[:, None] * scale)
        out_query[..., plain:] = turned.transpose(1, 2)
        out_key[..., :plain] = key_value[..., :plain].transpose(1, 2)
        out_key[..., plain:] = kernels.rotate(rotary_key, cos, sin).unsqueeze(1)
        return out_query, out_key, key_value[..., plain:].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)  # back to [B, S, A, …]
        cos, sin = ctx.saved_tensors
        plain, scale, kernels = ctx.plain, ctx.scale, ctx.kernels
        out_query = grad_query.new_empty(grad_query.shape)
        torch.mul(grad_query[..., :plain], scale, out=out_query[..., :plain])
        out_query[..., plain:] = kernels.rotate_backward(
            grad_query[..., plain:], cos[:, None] * scale, sin[:, None] * scale
        )
        out_key_value = torch.cat((grad_key[..., :plain], grad_value), -1)
        shared = grad_key[..., plain:].sum(2, dtype=torch.float32).to(grad_key.dtype)
        return out_query, out_key_value, kernels.rotate_backward(shared, cos, sin), None, None, None, None
