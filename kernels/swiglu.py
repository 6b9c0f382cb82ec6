"""SwiGLU times routing weights, and its backward. R rows, I inner width; each tensor is read and written once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Launch
from .norm import as_rows
from .op import fused

BLOCK = 2048
"""Columns that a program takes at a time."""


def swiglu_formula(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """`silu(gate) * up * weight` in the format of gate and up, computed in FP32 and rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    hidden = F.silu(gate) * up
    return (hidden if weights is None else hidden * weights.unsqueeze(-1)).to(gate_up.dtype)


def swiglu_backward_formula(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up, in their format, and of the weights, FP32 `[R]`, or None without weights."""
    gate, up = gate_up.float().chunk(2, -1)
    wide_grad, grad_weights = grad.float(), None
    grad_up, grad_silu = wide_grad * F.silu(gate), wide_grad * up
    if weights is not None:
        grad_weights = (grad_up * up).sum(-1)
        factor = weights.unsqueeze(-1)
        grad_up, grad_silu = grad_up * factor, grad_silu * factor
    return torch.cat((torch.ops.aten.silu_backward(grad_silu, gate), grad_up), -1).to(gate_up.dtype), grad_weights


def _block(inner: int) -> tuple[int, int]:
    """Columns of a block, and warps."""
    block = min(BLOCK, 1 << (inner - 1).bit_length())
    return block, max(1, block // 512)


def _gpu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate_up, (rows, both) = as_rows(gate_up), gate_up.shape
    inner = both // 2
    hidden = gate_up.new_empty(rows, inner)
    block, warps = _block(inner)
    from .triton.swiglu_kernels import swiglu as kernel

    Launch(
        kernel,
        rows,
        (gate_up, hidden if weights is None else weights.contiguous(), hidden, inner, gate_up.stride(0)),
        {"weighted": weights is not None, "block": block},
        num_warps=warps,
    ).run()
    return hidden


def _gpu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    gate_up, (rows, both) = as_rows(gate_up), gate_up.shape
    out, grad_weights = _shapes_backward(grad, gate_up, weights)
    block, warps = _block(both // 2)
    from .triton.swiglu_kernels import swiglu_backward as kernel

    Launch(
        kernel,
        rows,
        (
            *(grad.contiguous(), gate_up, out if weights is None else weights.contiguous(), out, grad_weights),
            *(both // 2, gate_up.stride(0)),
        ),
        {"weighted": weights is not None, "block": block},
        num_warps=warps,
    ).run()
    return out, grad_weights


def _shapes_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    of_weights = (0 if weights is None else gate_up.shape[0],)
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(of_weights, dtype=torch.float32)


def _backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate_up, grad_weights = swiglu_backward_formula(grad, gate_up, weights)
    return grad_gate_up, grad.new_empty(0, dtype=torch.float32) if grad_weights is None else grad_weights


swiglu: Any = fused(
    "swiglu(Tensor gate_up, Tensor? weights) -> Tensor",
    _gpu,
    swiglu_formula,
    lambda gate_up, weights: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
"""gate_up `[R, 2I]`, gate first, weights FP32 `[R]` or None -> `[R, I]` in the format of gate_up."""

swiglu_backward: Any = fused(
    "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights) -> (Tensor, Tensor)",
    _gpu_backward,
    _backward,
    _shapes_backward,
)
"""Gradient `[R, I]` -> gradients `[R, 2I]` of gate and up and FP32 `[R]` of the weights, empty without weights."""
