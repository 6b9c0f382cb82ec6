"""The three products of a linear layer in a quantising recipe, with their operands as DeepSeek-V3 makes them.

    forward    y  = x w^T    x quantised in 1 x 128 and kept in this form for W; w in 128 x 128
    I          dx = dy w     dy quantised in 1 x 128
    W          dw = dy^T x   dy quantised in 128 x 1; x read back, dequantised and quantised in 128 x 1 (V3 §3.5.2)

A W that is deferred holds both operands as codes, made by its I.

Transformer Engine quantises the 128 x 1 copy of x in the forward, from x itself. With power-of-two scales
the two copies differ only in values that are 2^15 times smaller than the largest value of either tile.

T tokens, R rows, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..differentiable import Function, once_differentiable
from . import gemm
from .gemm import Operand
from .kept import Kept
from .operations import groups_on, has_kernel, requantize_columns, restore
from .quantize import BlockQuantized
from .recipe import LinearRecipe, Quantizer
from .saved_tensors import memory_of
from .tensor_formats import SIDE


def keeps_nothing(recipe: LinearRecipe | None) -> bool:
    """Whether a layer with this recipe has no cache, or no gradient will follow."""
    return recipe is None or recipe.cache is None or not recipe.quantises or not torch.is_grad_enabled()


def keep(recipe: LinearRecipe | None, x: Tensor) -> Kept | None:
    """x `[..., K]` as the cache of a layer with this recipe; None for a recipe without a cache, and where no
    gradient will follow."""
    if keeps_nothing(recipe):
        return None
    assert recipe is not None and recipe.cache is not None
    if recipe.cache.format is None:
        return Kept((x.detach(),), lambda x: x)
    return _kept(recipe.cache.encode(x.flatten(0, -2), 1), x.shape, x.dtype)


def one_kernel_cache(recipe: LinearRecipe | None, gate_up: Tensor) -> Quantizer | None:
    """Quantizer of the cache that `swiglu_keeping` makes of this SwiGLU's input; None where it makes none."""
    if keeps_nothing(recipe) or gate_up.dtype != torch.bfloat16 or not has_kernel(gate_up.device):
        return None
    assert recipe is not None and recipe.cache is not None
    return recipe.cache if recipe.cache.is_plain else None


def _kept(codes: BlockQuantized, shape: torch.Size, dtype: torch.dtype | None) -> Kept:
    rest = codes.without_tensors()
    return Kept((codes.data, codes.scale), lambda data, scale: restore(rest(data, scale), dtype).view(shape))


def _kept_input(codes: BlockQuantized, shape: torch.Size) -> Kept:
    """Codes of a layer's input, which W quantises again along the rows."""
    kept, rest = _kept(codes, shape, None), codes.without_tensors()
    one_kernel = has_kernel(codes.data.device) and (codes.fmt, codes.tile) == ("e4m3", (1, SIDE))
    if not one_kernel or not codes.data.is_contiguous() or not codes.scale.is_contiguous():
        return kept
    return replace(kept, columns=lambda data, scale, **how: requantize_columns(rest(data, scale), **how))


class QuantizedWeight:
    """The quantised weight of a layer, made again when the weight has changed.

    A change in place must go through the parameter or a view of it, so that its version counts up. A write through
    `.data` is not noticed.
    """

    def __init__(self, recipe: LinearRecipe) -> None:
        self.recipe = recipe
        self._of: tuple[int, int] | None = None
        self._operands: dict[int, Operand] = {}

    def operand(self, weight: Tensor, contracted: int) -> Operand:
        """weight `[N, K]` or `[E, N, K]` for fprop, which contracts K (1), or for dgrad (0)."""
        now = weight._version, memory_of(weight)
        if now != self._of:
            self._of, self._operands = now, {}
        quantizer = self.recipe.weight
        if quantizer.format is not None and quantizer.format.square:
            contracted = 1  # the transposed copy is exact
        if contracted not in self._operands:
            self._operands[contracted] = self.recipe.operand(quantizer, weight.detach(), contracted)
        return self._operands[contracted]


class Later(Protocol):
    """Place of one use's weight gradient, given in its backward."""

    @property
    def deferring(self) -> bool:
        """Whether the computation waits in a queue."""

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """Take the computation; returns the gradient if autograd is to have it now."""


class QuantizedFunction(Function):
    """A linear layer, grouped where there are offsets. `ends` are the offsets on the host.

    `codes` are the quantised form in which x arrived, if any. `incoming`, called in the backward, gives the quantised
    form of the gradient. x and the gradient hold the dequantised values, so neither is quantised again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        quantized: QuantizedWeight,
        offsets: Tensor | None,
        ends: tuple[int, ...] | None,
        kept: Kept | None,
        rebuilt: bool,
        grad: bool,
        later: Later,
        codes: BlockQuantized | None = None,
        incoming: Callable[[], BlockQuantized | None] | None = None,
    ) -> Tensor:
        recipe, rows = quantized.recipe, x.flatten(0, -2)
        keeps_input = kept is None and not rebuilt and grad and ctx.needs_input_grad[1]
        if codes is not None and recipe.input.makes(codes):
            operand: Operand = codes if recipe.mode == "promoted" else rows
            if keeps_input:
                kept = _kept_input(codes, rows.shape)
        elif keeps_input and recipe.input.format is not None:
            codes, values = recipe.input.encode_with_values(rows, 1, ends, with_values=recipe.mode == "fast")
            operand = codes if recipe.mode == "promoted" or values is None else values
            kept = _kept_input(codes, rows.shape)
        else:
            operand = recipe.operand(recipe.input, rows, 1, ends)
        if kept is None:
            kept = _as_fprop_saw_it(recipe.input, x)
        ctx.save_for_backward(*kept.tensors, *(() if offsets is None else (offsets,)))
        ctx.weight, ctx.quantized, ctx.later, ctx.incoming = weight, quantized, later, incoming
        ctx.restore, ctx.columns, ctx.ends = kept.restore, kept.columns, ends
        y = _product(gemm.fprop, operand, quantized.operand(weight, 1), offsets, ends, recipe, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), weight, quantized, ends = grads, ctx.weight, ctx.quantized, ctx.ends
        recipe, rows = quantized.recipe, grad.flatten(0, -2)
        saved = ctx.saved_tensors
        offsets, saved = (None, saved) if ends is None else (saved[-1], saved[:-1])
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = columns = None
        codes = None if ctx.incoming is None else ctx.incoming()
        if needs_x:
            if codes is not None and recipe.gradient.makes(codes):
                dy: Operand = codes if recipe.mode == "promoted" else rows
            elif needs_weight and recipe.gradient.has_kernel(rows):
                codes, columns = recipe.gradient.encode_both(rows, ends)
                dy = codes if recipe.mode == "promoted" else restore(codes)
            else:
                dy = recipe.operand(recipe.gradient, rows, 1, ends)
            grad_x = _product(gemm.dgrad, dy, quantized.operand(weight, 0), offsets, ends, recipe, grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if needs_weight:
            input = partial(_input_of_w, recipe, ctx.restore, ctx.columns, saved, ends)
            gradient = columns if columns is not None else rows
            if ctx.later.deferring:
                # What waits are codes for W alone: half of the bytes of values, and no activation of another format.
                gradient = _as_codes(recipe.gradient, gradient, ends)
                if recipe.input.format is not None:
                    input = partial(_same, _as_codes(recipe.input, input(), ends))
            compute = partial(_weight_gradient, gradient, input, offsets, ends, recipe, weight.dtype)
            grad_weight = ctx.later(compute)
        return grad_x, grad_weight, *([None] * 9)


def _input_of_w(
    recipe: LinearRecipe,
    restore: Callable[..., Tensor],
    columns: Callable[..., BlockQuantized] | None,
    saved: tuple[Tensor, ...],
    ends: tuple[int, ...] | None,
) -> Operand:
    """W's input: restored, or quantised for W already where one kernel does both."""
    format = recipe.input.format
    if columns is not None and format is not None and recipe.input.is_plain:
        return columns(*saved, groups=groups_on(saved[0].device, ends), pow2_scales=format.pow2)
    return restore(*saved).flatten(0, -2)


def _same(operand: Operand) -> Operand:
    return operand


def _as_codes(quantizer: Quantizer, operand: Operand, ends: tuple[int, ...] | None) -> Operand:
    """The operand quantised for W; as it is where its class has no format."""
    if isinstance(operand, BlockQuantized) or quantizer.format is None:
        return operand
    return quantizer.encode(operand, 0, ends)


def _weight_gradient(
    dy: Operand,
    input: Callable[[], Operand],
    offsets: Tensor | None,
    ends: tuple[int, ...] | None,
    recipe: LinearRecipe,
    dtype: torch.dtype,
) -> Tensor:
    left, right = (
        operand if isinstance(operand, BlockQuantized) else recipe.operand(quantizer, operand, 0, ends)
        for quantizer, operand in ((recipe.gradient, dy), (recipe.input, input()))
    )
    return _product(gemm.wgrad, left, right, offsets, ends, recipe, dtype)


def _as_fprop_saw_it(quantizer: Quantizer, x: Tensor) -> Kept:
    """Keep x itself, where another part makes x again, the backward does not need x, or x is not quantised."""
    return Kept((x.detach(),), lambda x: quantizer.values(x.flatten(0, -2), 1))


def _product(
    function: Callable[..., Tensor],
    left: Operand,
    right: Operand,
    offsets: Tensor | None,
    ends: tuple[int, ...] | None,
    recipe: LinearRecipe,
    dtype: torch.dtype,
) -> Tensor:
    both = isinstance(left, BlockQuantized) and isinstance(right, BlockQuantized)
    mode = recipe.mode if both else "fast"
    return function(left, right, offsets=offsets, ends=ends, mode=mode, out_dtype=dtype, products=recipe.products)
