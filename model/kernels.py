"""Memory-bound kernels of the model, each with its backward written out.

On CPUs they are formulas of torch's operations, off CPUs the fused kernels of the package `kernels`. `Kernels` holds
them, or the formulas fused by `torch.compile`; the autograd Functions below call the kernels of their model. Statistics
and products of the backward are FP32, so results in BF16 are rounded once, at the end.

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

from ..differentiable import Function, once_differentiable
from ..fp8.kept import Kept
from ..kernels.assemble import assemble, assemble_backward, assemble_backward_formula, assemble_formula
from ..kernels.norm import (
    add_rms_norm,
    add_rows,
    add_three,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_formula,
    rms_norm_formula,
    sum_rows,
)
from ..kernels.swiglu import swiglu as fused_swiglu
from ..kernels.swiglu import swiglu_backward, swiglu_backward_formula, swiglu_formula
from ..weight_gradients import GradientSum

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
    compiled: bool = False

    @classmethod
    def make(cls, compile: bool = False) -> Kernels:
        if compile:
            fuse = partial(torch.compile, dynamic=True)
            return cls(
                *(fuse(rms_norm_formula), fuse(rms_norm_backward_formula)),
                *(fuse(swiglu_formula), fuse(swiglu_backward_formula)),
                compiled=True,
            )
        return cls(_rms_norm, _rms_norm_backward, _swiglu, _swiglu_backward)

    def fuse(self, x: Tensor) -> bool:
        """Whether operations on x run as the fused kernels of GPUs."""
        return not self.compiled and on_gpu(x)


def on_gpu(x: Tensor) -> bool:
    """Whether x takes the way of GPUs: on any device but a CPU, and so on the meta device too."""
    return x.device.type != "cpu"


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    if on_gpu(x):
        result: Tensor = rms_norm(x, gain, eps)
    elif x.numel() <= BLOCK_ELEMENTS:
        result = rms_norm_formula(x, gain, eps)
    else:
        (result,) = _by_rows(lambda x: (rms_norm_formula(x, gain, eps),), (x,))
    return result


def _rms_norm_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if on_gpu(x):
        grad_x, partial_sums = rms_norm_backward([grad], None, x, gain, eps)
        return grad_x, sum_rows(partial_sums, gain.dtype)
    if x.numel() <= BLOCK_ELEMENTS:
        return rms_norm_backward_formula(grad, x, gain, eps)
    grad_x, grad_gain = _by_rows(rms_norm_backward_formula, (grad, x), gain, eps, summed=1)
    return grad_x, grad_gain


def _swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    if on_gpu(gate_up):
        result: Tensor = fused_swiglu(gate_up, weights)
    elif gate_up.numel() <= BLOCK_ELEMENTS:
        result = swiglu_formula(gate_up, weights)
    else:
        (result,) = _by_rows(lambda *rows: (swiglu_formula(*rows),), (gate_up, weights))
    return result


def _swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if on_gpu(gate_up):
        grad_gate_up, grad_weights = swiglu_backward(grad, gate_up, weights)
        return grad_gate_up, None if weights is None else grad_weights
    if grad.numel() <= BLOCK_ELEMENTS:
        return swiglu_backward_formula(grad, gate_up, weights)
    grad_gate_up, grad_weights = _by_rows(swiglu_backward_formula, (grad, gate_up, weights))
    return grad_gate_up, grad_weights


class RMSNormFunction(Function):
    """RMSNorm that saves only its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, eps: float, kernels: Kernels, total: GradientSum | None = None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gain, ctx.eps, ctx.kernels, ctx.total = gain, eps, kernels, total  # no hook need see a parameter
        return kernels.rms_norm(_rows(x), gain, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), gain = ctx.saved_tensors, ctx.gain
        rows = _rows(grads[0]), _rows(x)
        if ctx.total is not None and ctx.kernels.fuse(x):
            grad_x, partial_sums = rms_norm_backward([rows[0]], None, rows[1], gain, ctx.eps)
            return grad_x.view(x.shape), _gain_gradient(partial_sums, gain, ctx.total), None, None, None
        grad_x, wide = ctx.kernels.rms_norm_backward(*rows, gain, ctx.eps)
        grad_gain: Tensor | None = wide.to(gain.dtype)
        if ctx.total is not None:
            ctx.total.add(grad_gain)
            grad_gain = None
        return grad_x.view(x.shape), grad_gain, None, None, None


def _gain_gradient(partial_sums: Tensor, gain: Tensor, total: GradientSum | None) -> Tensor | None:
    """Gradient of a gain, from the partial sums of a GPU's kernel; None where it has been added to a sum."""
    if total is None:
        gradient: Tensor = sum_rows(partial_sums, gain.dtype)
        return gradient
    add_rows(total.buffer, partial_sums)
    total.arrived()
    return None


class NormFunction(Function):
    """The residual stream `[..., H]`, and `users` times its norm, on GPUs.

    The stream is x plus `addend`, or x. Every user has a tensor of its own, so that the gradients of all users and of
    the stream are added up in the kernel of the backward. The Function saves the stream alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        addend: Tensor | None,
        gain: Tensor,
        eps: float,
        users: int,
        of_gain: GradientSum | None = None,
    ) -> tuple[Tensor, ...]:
        if addend is None:
            total, normed = x, rms_norm(_rows(x), gain, eps)
        else:
            total, normed = add_rms_norm(_rows(x), _rows(addend), gain, eps)
            total = total.view(x.shape)
        ctx.save_for_backward(total)
        ctx.gain, ctx.eps, ctx.added, ctx.of_gain = gain, eps, addend is not None, of_gain
        ctx.set_materialize_grads(False)
        normed = normed.view(x.shape)
        return (total, normed, *(normed.detach() for _ in range(users - 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        passed, *of_users = grads
        (total,), gain = ctx.saved_tensors, ctx.gain
        arrived, grad_gain = [_rows(grad) for grad in of_users if grad is not None], None
        grad_total = passed
        if arrived:
            rows = None if passed is None else _rows(passed)
            grad_total, partial_sums = rms_norm_backward(arrived, rows, _rows(total), gain, ctx.eps)
            grad_total, grad_gain = grad_total.view(total.shape), _gain_gradient(partial_sums, gain, ctx.of_gain)
        return grad_total, grad_total if ctx.added else None, grad_gain, None, None, None


class SumFunction(Function):
    """Sum of three tensors of one shape in one kernel, rounded once, on GPUs."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        result: Tensor = add_three(first, second, third)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0], grads[0]


class SwiGLUFunction(Function):
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


class AssembleFunction(Function):
    """Rotation and layout of queries, keys and values for attention.

    In: query `[B, S, A, N+R]`, keys and values `[B, S, A, N+V]`, the one rotary key `[B, S, R]` that all heads share,
    rotary `[S, R/2]` complex. Out, heads before positions: query `[B, A, S, N+R]` times `scale`, key `[B, A, S, N+R]`,
    value `[B, A, S, V]` (A heads, N plain width, R rotated width, V value width). In memory heads come before positions
    on CPUs, where attention multiplies matrices per head; elsewhere behind them, as the kernels of GPUs read them. The
    Function saves no activation.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rotary)
        ctx.scale = scale
        return assembled(query, key_value, rotary_key, rotary, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (rotary,) = ctx.saved_tensors
        run: Callable[..., tuple[Tensor, ...]] = assemble_backward if on_gpu(grads[0]) else assemble_backward_formula
        return *run(*grads, rotary, ctx.scale), None, None


def assembled(
    query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of `AssembleFunction`."""
    if not on_gpu(query):
        return assemble_formula(query, key_value, rotary_key, rotary, scale)
    out_query, out_key, value = assemble(query, key_value, rotary_key, rotary, scale)
    return out_query.transpose(1, 2), out_key.transpose(1, 2), value.transpose(1, 2)


class EmbeddingFunction(Function):
    """Rows of `table` `[V, H]` by `tokens` `[B, S]`, with the gradients of a row summed in FP32 and rounded once.

    PyTorch's CPU kernel sums them in the table's format: a frequent token's BF16 sum stops growing at 256 times its
    addends. PyTorch's CUDA kernel sums in FP32 already, and is used on GPUs. There a sum of the table's gradients gets
    the rows that occur, unrounded, and nothing of the table's size is made.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, total: GradientSum | None = None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype, ctx.total = table.shape[0], table.dtype, total
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (tokens,), total = ctx.saved_tensors, ctx.total
        if on_gpu(tokens):
            if total is None:
                return None, torch.ops.aten.embedding_dense_backward(grads[0], tokens, ctx.rows, -1, False), None
            add_rows_of_tokens(total.buffer, tokens.flatten(), grads[0].flatten(0, -2))
            total.arrived()
            return None, None, None
        whole = torch.zeros(ctx.rows, grads[0].shape[-1], dtype=torch.float32)
        whole.index_add_(0, tokens.flatten(), grads[0].flatten(0, -2).float())
        gradient = whole.to(ctx.dtype)
        if total is None:
            return None, gradient, None
        total.add(gradient)
        return None, None, None


def add_rows_of_tokens(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add `rows` `[T, H]` to the rows `tokens` `[T]` of `total` `[V, H]` FP32, those of one token first, in FP32.

    Every row of `total` gets one addend that may differ from zero, so the result does not depend on the order in which
    a GPU adds.
    """
    ordered, order = tokens.sort(stable=True)
    begins = torch.ones_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    place = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)  # of a row's token among those seen
    sums = torch.ops.aten.embedding_dense_backward(rows.float(), place, len(tokens), -1, False)
    total.index_add_(0, torch.zeros_like(tokens).scatter_(0, place, tokens), sums)
