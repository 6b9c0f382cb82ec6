"""SwiGLU times the gate weight, and its backward, from gate and up or from their cache, in one pass each.

Values are rounded as the unfused kernels do, to BF16 where a cache is restored and where a result is written or
quantised: both give the same bits, except for the last bits of exp and of the division in sigmoid. PTX's ex2.approx and
div.full are within 2 ulp each and the argument of ex2 is rounded once. So the relative error of sigmoid(x) is at most
(5 + |x|) 2^-23; PyTorch's is about 2 ulp.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton
from .numerics import LARGEST_BF16, SIDE, bounds_of_tile, store_columns, store_rows, tell

triton, tl = load_triton()


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _load(
    values,
    scales,
    row,
    row_inside,
    column,
    column_inside,
    width,
    tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
):
    """FP32 `[rows, 128]` of a BF16 matrix `[., width]`, or of codes and scales `[., tiles]`; zeros outside.

    With `even` the 128 columns are one tile. Otherwise they may lie in two. Products are rounded to BF16.
    """
    inside = row_inside[:, None] & column_inside[None, :]
    wide = tl.load(values + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if cached:
        if even:
            tile = tl.min(column, axis=0) // SIDE
            scale = tl.load(scales + row.to(tl.int64) * tiles + tile, mask=row_inside, other=0.0)
            wide = wide * scale[:, None]
        else:
            wide = wide * tl.load(
                scales + row[:, None].to(tl.int64) * tiles + column[None, :] // SIDE, mask=inside, other=0.0
            )
        wide = _rounded(wide)
    return wide


@triton.jit
def _activated(gate, up, weights, row, row_inside, weighted: tl.constexpr):
    """`silu(gate) * up * weight` of rows, FP32."""
    hidden = gate * _sigmoid(gate) * up
    if weighted:
        hidden = hidden * tl.load(weights + row, mask=row_inside, other=0.0)[:, None]
    return hidden


@triton.jit
def swiglu_rows(
    gate_up,
    cache_scales,
    weights,
    hidden,
    codes,
    scales,
    met,
    rows,
    inner,
    cache_tiles,
    tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
    keep: tl.constexpr,
    pow2: tl.constexpr,
    watched: tl.constexpr,
    block: tl.constexpr,
):
    """Make `block` rows of 128 columns of `hidden` BF16 `[rows, inner]` per program.

    With `keep`, which needs BF16 and `even`, gate and up are quantised to codes `[rows, 2 inner]` with scales
    `[rows, 2 tiles]`, too, and `met` is set where one is infinite or NaN, if `watched`.
    """
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * block + tl.arange(0, block)
    column = tile * SIDE + tl.arange(0, SIDE)
    row_inside, column_inside = row < rows, column < inner
    width = 2 * inner
    gate = _load(gate_up, cache_scales, row, row_inside, column, column_inside, width, cache_tiles, cached, even)
    up = _load(gate_up, cache_scales, row, row_inside, column + inner, column_inside, width, cache_tiles, cached, even)
    made = _activated(gate, up, weights, row, row_inside, weighted)
    place = hidden + row[:, None].to(tl.int64) * inner + column[None, :]
    tl.store(place, made.to(tl.bfloat16), mask=row_inside[:, None] & column_inside[None, :])
    if keep:
        if watched:
            tell(gate, met)
            tell(up, met)
        across = 2 * tiles
        store_rows(
            gate, codes, scales, row, row_inside, column, column_inside, width, across, tile, pow2, LARGEST_BF16
        )  # fmt: skip
        store_rows(
            up, codes, scales, row, row_inside, column + inner, column_inside, width, across, tile + tiles, pow2,
            LARGEST_BF16,
        )  # fmt: skip


@triton.jit
def swiglu_columns(
    gate_up,
    cache_scales,
    weights,
    table,
    codes,
    scales,
    rows,
    inner,
    cache_tiles,
    across,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
    groups: tl.constexpr,
    pow2: tl.constexpr,
    block: tl.constexpr,
):
    """Make `block` columns of one tile down per program: codes `[inner, rows]`, scales `[tiles down, inner]`.

    `block` divides 128, and `across` of them are as wide as `inner`.
    """
    tile = tl.program_id(0) // across
    first, end = bounds_of_tile(table, rows, tile, groups)
    row = first + tl.arange(0, SIDE)
    row_inside = row < end
    column = tl.program_id(0) % across * block + tl.arange(0, block)
    column_inside = column < inner
    width = 2 * inner
    gate = _load(gate_up, cache_scales, row, row_inside, column, column_inside, width, cache_tiles, cached, even)
    up = _load(gate_up, cache_scales, row, row_inside, column + inner, column_inside, width, cache_tiles, cached, even)
    hidden = _rounded(_activated(gate, up, weights, row, row_inside, weighted))
    store_columns(
        hidden, codes, scales, row, row_inside, column, column_inside, rows, inner, tile, pow2, LARGEST_BF16
    )  # fmt: skip


@triton.jit
def swiglu_backward(
    grad,
    gate_up,
    cache_scales,
    weights,
    grad_gate_up,
    grad_weights,
    rows,
    inner,
    cache_tiles,
    tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Make `block` rows of the gradients of gate and up BF16 `[rows, 2 inner]` and of the weights `[rows]` per program.

    A weight's gradient is the sum over its row, in one program and so in a fixed order.
    """
    row = tl.program_id(0) * block + tl.arange(0, block)
    row_inside = row < rows
    width = 2 * inner
    weight = tl.load(weights + row, mask=row_inside, other=0.0)[:, None] if weighted else 1.0
    total = tl.zeros([block], tl.float32)
    for tile in range(tiles):
        column = tile * SIDE + tl.arange(0, SIDE)
        inside = column < inner
        gate = _load(gate_up, cache_scales, row, row_inside, column, inside, width, cache_tiles, cached, even)
        up = _load(gate_up, cache_scales, row, row_inside, column + inner, inside, width, cache_tiles, cached, even)
        wide_grad = _load(grad, grad, row, row_inside, column, inside, inner, 0, False, even)
        sigmoid = _sigmoid(gate)
        grad_up = wide_grad * (gate * sigmoid)
        grad_silu = wide_grad * up
        if weighted:
            total = total + tl.sum(grad_up * up, axis=1)
            grad_up = grad_up * weight
            grad_silu = grad_silu * weight
        grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        place = grad_gate_up + row[:, None].to(tl.int64) * width + column[None, :]
        mask = row_inside[:, None] & inside[None, :]
        tl.store(place, grad_gate.to(tl.bfloat16), mask=mask)
        tl.store(place + inner, grad_up.to(tl.bfloat16), mask=mask)
    if weighted:
        tl.store(grad_weights + row, total, mask=row_inside)
