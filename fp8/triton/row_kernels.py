"""Rows quantised along their columns, in E4M3 or E5M6, and restored from their codes."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton
from .numerics import MOST_E5M6, SIDE, scales_of, store_rows, tell

triton, tl = load_triton()


@triton.jit
def _load(x, row, row_inside, column, column_inside, width):
    """FP32 values of x `[., width]` at rows and columns, zeros outside."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def quantize_rows(
    x,
    codes,
    scales,
    met,
    rows,
    width,
    tiles,
    pow2: tl.constexpr,
    largest: tl.constexpr,
    watched: tl.constexpr,
    block: tl.constexpr,
):
    """Make E4M3 codes `[rows, width]` of `block` rows of one tile across per program, and scales `[rows, tiles]`.

    `met` is set where a value is infinite or NaN, if `watched`.
    """
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * block + tl.arange(0, block)
    column = tile * SIDE + tl.arange(0, SIDE)
    row_inside, column_inside = row < rows, column < width
    values = _load(x, row, row_inside, column, column_inside, width)
    if watched:
        tell(values, met)
    store_rows(values, codes, scales, row, row_inside, column, column_inside, width, tiles, tile, pow2, largest)


@triton.jit
def _e5m6(values, scales, row, row_inside, tiles, tile, pow2: tl.constexpr, largest: tl.constexpr):
    """Bits of FP16, int32, of FP32 values `[rows, 128]` quantised to E5M6, whose scales are stored at `tile`."""
    multiplier, scale = scales_of(tl.max(tl.abs(values), axis=1), pow2, largest, MOST_E5M6)
    tl.store(scales + row.to(tl.int64) * tiles + tile, scale, mask=row_inside)
    scaled = values * multiplier[:, None]
    # Comparisons with NaN are false: NaN stays.
    scaled = tl.where(scaled > MOST_E5M6, MOST_E5M6, tl.where(scaled < -MOST_E5M6, -MOST_E5M6, scaled))
    bits = scaled.to(tl.int32, bitcast=True)
    # At least 2^-14, the smallest normal number; near 1.5 * 2^17 times its power of two FP32 is spaced as E5M6 is.
    magic = tl.maximum(bits & 0x7F800000, 0x38800000).to(tl.float32, bitcast=True) * 196608.0
    rounded = ((scaled + magic) - magic).to(tl.int32, bitcast=True)
    signed = (rounded & 0x7FFFFFFF) | (bits & -0x80000000)
    return signed.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def pack_rows(
    x,
    packed,
    scales,
    met,
    rows,
    half,
    tiles,
    pow2: tl.constexpr,
    largest: tl.constexpr,
    watched: tl.constexpr,
    block: tl.constexpr,
):
    """Make E5M6 codes `[rows, 3 half]` of x `[rows, 2 half]`, and scales `[rows, tiles]`; 128 divides `half`.

    A program makes `block` rows of one tile of each half of the columns, whose lower four bits share bytes.
    """
    part = tl.program_id(0) % (tiles // 2)
    row = tl.program_id(0) // (tiles // 2) * block + tl.arange(0, block)
    row_inside = row < rows
    column = part * SIDE + tl.arange(0, SIDE)
    inside = column < half
    first = _load(x, row, row_inside, column, inside, 2 * half)
    second = _load(x, row, row_inside, column + half, inside, 2 * half)
    if watched:
        tell(first, met)
        tell(second, met)
    first = _e5m6(first, scales, row, row_inside, tiles, part, pow2, largest)
    second = _e5m6(second, scales, row, row_inside, tiles, part + tiles // 2, pow2, largest)
    start = packed + row[:, None].to(tl.int64) * (3 * half) + column[None, :]
    mask = row_inside[:, None] & inside[None, :]
    tl.store(start, ((first >> 8) & 0xFF).to(tl.uint8), mask=mask)
    tl.store(start + half, ((second >> 8) & 0xFF).to(tl.uint8), mask=mask)
    low = ((first >> 4) & 0xF) | (second & 0xF0)
    tl.store(start + 2 * half, low.to(tl.uint8), mask=mask)


@triton.jit
def dequantize_rows(
    codes,
    scales,
    out,
    rows,
    width,
    code_stride,
    scale_stride,
    tiles,
    half,
    packed: tl.constexpr,
    even: tl.constexpr,
    block: tl.constexpr,
):
    """Write the products of codes and scales of `block` rows of one tile across per program to `out` `[rows, width]`.

    Rows of codes and of scales begin every `code_stride` and `scale_stride` elements. `packed` codes are E5M6's bytes,
    whose lower half bytes follow `half` to a row; with `even` a tile's columns lie all in one half.
    """
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * block + tl.arange(0, block)
    column = tile * SIDE + tl.arange(0, SIDE)
    row_inside, column_inside = row < rows, column < width
    inside = row_inside[:, None] & column_inside[None, :]
    start = codes + row[:, None].to(tl.int64) * code_stride
    if packed:
        second = tile * SIDE >= half if even else (column >= half)[None, :]
        high = tl.load(start + column[None, :], mask=inside, other=0).to(tl.int32)
        place = width + column[None, :] - tl.where(second, half, 0)
        low = tl.load(start + place, mask=inside, other=0).to(tl.int32)
        bits = (high << 8) | tl.where(second, low & 0xF0, (low & 0xF) << 4)
        values = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        values = tl.load(start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row.to(tl.int64) * scale_stride + tile, mask=row_inside, other=0.0)
    into = out + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(into, (values * scale[:, None]).to(out.dtype.element_ty), mask=inside)
