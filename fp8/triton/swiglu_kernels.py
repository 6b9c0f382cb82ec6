"""SwiGLU times the gate weight, and its backward, each with the quantisation of its result in the same pass.

A value is rounded to BF16 before it is quantised, as the unfused kernels do: both give the same codes, except for
the last bits of exp and of the division in sigmoid. PTX's ex2.approx and div.full are within 2 ulp each and the
argument of ex2 is rounded once. So the relative error of sigmoid(x) is at most (5 + |x|) 2^-23; PyTorch's is about 2
ulp.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton
from .numerics import LARGEST_BF16, SIDE, bounds_of_tile, store_columns, store_rows

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

    With `even` the 128 columns are one tile. Otherwise they may lie in two.
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
    return wide


@triton.jit
def _hidden(
    gate_up,
    cache_scales,
    weights,
    row,
    row_inside,
    column,
    column_inside,
    inner,
    cache_tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
):
    """`silu(gate) * up * weight` of rows and columns, rounded to BF16, as FP32."""
    gate = _load(
        gate_up, cache_scales, row, row_inside, column, column_inside, 2 * inner, cache_tiles, cached, even
    )  # fmt: skip
    up = _load(
        gate_up, cache_scales, row, row_inside, column + inner, column_inside, 2 * inner, cache_tiles, cached, even
    )  # fmt: skip
    hidden = gate * _sigmoid(gate) * up
    if weighted:
        hidden = hidden * tl.load(weights + row, mask=row_inside, other=0.0)[:, None]
    return _rounded(hidden)


@triton.jit
def swiglu_rows(
    gate_up,
    cache_scales,
    weights,
    codes,
    scales,
    rows,
    inner,
    cache_tiles,
    tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
    pow2: tl.constexpr,
    block: tl.constexpr,
):
    """Make `block` rows of one tile across per program: codes `[rows, inner]`, scales `[rows, tiles]`."""
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * block + tl.arange(0, block)
    column = tile * SIDE + tl.arange(0, SIDE)
    row_inside, column_inside = row < rows, column < inner
    hidden = _hidden(
        gate_up, cache_scales, weights, row, row_inside, column, column_inside, inner, cache_tiles, cached, even,
        weighted,
    )  # fmt: skip
    store_rows(
        hidden, codes, scales, row, row_inside, column, column_inside, inner, tiles, tile, pow2, LARGEST_BF16
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
    hidden = _hidden(
        gate_up, cache_scales, weights, row, row_inside, column, column_inside, inner, cache_tiles, cached, even,
        weighted,
    )  # fmt: skip
    store_columns(
        hidden, codes, scales, row, row_inside, column, column_inside, rows, inner, tile, pow2, LARGEST_BF16
    )  # fmt: skip


@triton.jit
def _gradients(
    grad,
    gate_up,
    cache_scales,
    weights,
    row,
    row_inside,
    column,
    column_inside,
    inner,
    cache_tiles,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
):
    """Gradients of gate and up, rounded to BF16, as FP32, and the terms of the weights' gradients."""
    width = 2 * inner
    gate = _load(gate_up, cache_scales, row, row_inside, column, column_inside, width, cache_tiles, cached, even)
    up = _load(gate_up, cache_scales, row, row_inside, column + inner, column_inside, width, cache_tiles, cached, even)
    wide_grad = _load(grad, grad, row, row_inside, column, column_inside, inner, 0, False, even)
    sigmoid = _sigmoid(gate)
    grad_up = wide_grad * (gate * sigmoid)
    grad_silu = wide_grad * up
    terms = grad_up * up
    if weighted:
        weight = tl.load(weights + row, mask=row_inside, other=0.0)[:, None]
        grad_up = grad_up * weight
        grad_silu = grad_silu * weight
    grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return _rounded(grad_gate), _rounded(grad_up), terms


@triton.jit
def _place(wide, inner, even: tl.constexpr):
    """Columns of gate to read for `wide` columns of the gradient of gate and up, and a mask of the columns inside.

    With `even`, `wide` are columns of gate, and up's gradient is made in the same pass. Otherwise `wide` may be columns
    of both, and `wide >= inner` are up's.
    """
    if even:
        return wide, wide < inner
    return wide - tl.where(wide >= inner, inner, 0), wide < 2 * inner


@triton.jit
def swiglu_backward(
    grad,
    gate_up,
    cache_scales,
    weights,
    table,
    codes,
    scales,
    codes_t,
    scales_t,
    grad_weights,
    rows,
    inner,
    cache_tiles,
    tiles,
    across,
    cached: tl.constexpr,
    even: tl.constexpr,
    weighted: tl.constexpr,
    groups: tl.constexpr,
    pow2: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of gate and up in both tilings, and the parts `[rows, across]` of the weights' gradients.

    Codes `[rows, 2 inner]` with scales `[rows, tiles]`, and transposed codes `[2 inner, rows]` with scales
    `[tiles down, 2 inner]`. A program makes 128 rows of 128 columns: of gate and of up if 128 divides `inner`, else
    of both side by side, since one tile holds some of each. A program computes the gradients twice, `block` rows at a
    time for one tiling and `block` columns at a time for the other, since so many FP32 values do not fit into
    registers. The second read is from the cache.
    """
    part, tile = tl.program_id(0) % across, tl.program_id(0) // across
    first, end = bounds_of_tile(table, rows, tile, groups)
    width = 2 * inner

    wide = part * SIDE + tl.arange(0, SIDE)
    column, inside = _place(wide, inner, even)
    for start in range(0, SIDE, block):
        row = first + start + tl.arange(0, block)
        row_inside = row < end
        grad_gate, grad_up, terms = _gradients(
            grad, gate_up, cache_scales, weights, row, row_inside, column, inside, inner, cache_tiles, cached, even,
            weighted,
        )  # fmt: skip
        if even:
            store_rows(grad_gate, codes, scales, row, row_inside, wide, inside, width, tiles, part, pow2, LARGEST_BF16)
            store_rows(
                grad_up, codes, scales, row, row_inside, wide + inner, inside, width, tiles, part + across, pow2,
                LARGEST_BF16,
            )  # fmt: skip
        else:
            is_up = (wide >= inner)[None, :]
            both, terms = tl.where(is_up, grad_up, grad_gate), tl.where(is_up, terms, 0.0)
            store_rows(both, codes, scales, row, row_inside, wide, inside, width, tiles, part, pow2, LARGEST_BF16)
        if weighted:
            tl.store(grad_weights + row.to(tl.int64) * across + part, tl.sum(terms, axis=1), mask=row_inside)

    row_of_all = first + tl.arange(0, SIDE)
    all_inside = row_of_all < end
    for start in range(0, SIDE, block):
        some = part * SIDE + start + tl.arange(0, block)
        some_column, some_inside = _place(some, inner, even)
        grad_gate_t, grad_up_t, _ = _gradients(
            grad, gate_up, cache_scales, weights, row_of_all, all_inside, some_column, some_inside, inner, cache_tiles,
            cached, even, weighted,
        )  # fmt: skip
        if even:
            store_columns(
                grad_gate_t, codes_t, scales_t, row_of_all, all_inside, some, some_inside, rows, width, tile, pow2,
                LARGEST_BF16,
            )  # fmt: skip
            store_columns(
                grad_up_t, codes_t, scales_t, row_of_all, all_inside, some + inner, some_inside, rows, width, tile,
                pow2, LARGEST_BF16,
            )  # fmt: skip
        else:
            both_t = tl.where((some >= inner)[None, :], grad_up_t, grad_gate_t)
            store_columns(
                both_t, codes_t, scales_t, row_of_all, all_inside, some, some_inside, rows, width, tile, pow2,
                LARGEST_BF16,
            )  # fmt: skip
