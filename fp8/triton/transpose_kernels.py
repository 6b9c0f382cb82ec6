"""A matrix quantised along rows and, from the same read, along columns and transposed."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton
from .numerics import LARGEST_BF16, LARGEST_FP32, SIDE, bounds_of_tile, store_columns, store_rows, tell

triton, tl = load_triton()


@triton.jit
def _load(x, row, row_inside, column, column_inside, width):
    """FP32 values of x `[., width]` at rows and columns, zeros outside."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def quantize_both(
    x,
    table,
    codes,
    scales,
    codes_t,
    scales_t,
    met,
    rows,
    width,
    tiles,
    groups: tl.constexpr,
    pow2: tl.constexpr,
    watched: tl.constexpr,
    block: tl.constexpr,
):
    """Make 128 x 128 values of x `[rows, width]` BF16 in both tilings per program.

    A program takes `block` rows at a time for one tiling and `block` columns at a time for the other, so that many
    programs fit into the registers of a multiprocessor. The second read is from the cache. `met` is set where a value
    is infinite or NaN, if `watched`.
    """
    part, tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first, end = bounds_of_tile(table, rows, tile, groups)

    column = part * SIDE + tl.arange(0, SIDE)
    column_inside = column < width
    for start in range(0, SIDE, block):
        row = first + start + tl.arange(0, block)
        row_inside = row < end
        values = _load(x, row, row_inside, column, column_inside, width)
        if watched:
            tell(values, met)
        store_rows(
            values, codes, scales, row, row_inside, column, column_inside, width, tiles, part, pow2, LARGEST_BF16
        )  # fmt: skip

    all_row = first + tl.arange(0, SIDE)
    all_inside = all_row < end
    for start in range(0, SIDE, block):
        some = part * SIDE + start + tl.arange(0, block)
        some_inside = some < width
        values_t = _load(x, all_row, all_inside, some, some_inside, width)
        store_columns(
            values_t, codes_t, scales_t, all_row, all_inside, some, some_inside, rows, width, tile, pow2, LARGEST_BF16
        )  # fmt: skip


@triton.jit
def requantize_columns(
    codes,
    scales,
    table,
    codes_t,
    scales_t,
    rows,
    width,
    tiles,
    groups: tl.constexpr,
    from_pow2: tl.constexpr,
    pow2: tl.constexpr,
    block: tl.constexpr,
):
    """Dequantise 128 rows of `block` columns per program, with scales along rows, and quantise them along columns.

    As in `fp8/quantize.py`, power-of-two scales give BF16 values and others FP32. `block` divides 128.
    """
    parts = tl.cdiv(width, block)
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    first, end = bounds_of_tile(table, rows, tile, groups)
    row = first + tl.arange(0, SIDE)
    row_inside = row < end
    column = part * block + tl.arange(0, block)
    column_inside = column < width
    scale = tl.load(scales + row.to(tl.int64) * tiles + part * block // SIDE, mask=row_inside, other=0.0)
    values = _load(codes, row, row_inside, column, column_inside, width) * scale[:, None]
    if from_pow2:
        values = values.to(tl.bfloat16).to(tl.float32)
    largest = LARGEST_BF16 if from_pow2 else LARGEST_FP32
    store_columns(
        values, codes_t, scales_t, row, row_inside, column, column_inside, rows, width, tile, pow2, largest
    )  # fmt: skip
