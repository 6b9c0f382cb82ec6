"""Numerics that the kernels share: the scales of `fp8/quantize.py`, and tiles of values written as codes.

Scales need correctly rounded divisions, so Triton's `/` will not do. They also need FP32 subnormals, which stay as they
are because nothing here is compiled with a flush to zero. The conversions to E4M3 round to nearest even and saturate
(cvt.rn.satfinite), and all NaN become the same one, 0x7F.

Maxima ignore NaN. Maxima that propagate NaN would also do, but the ptxas of CUDA 12.8 and 12.9 miscompiles a kernel
that has them and also stores FP8 codes to transposed addresses (triton-lang/triton issue 11111).
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton

triton, tl = load_triton()

SIDE = tl.constexpr(128)  # elements along a tile
MOST = tl.constexpr(448.0)  # of E4M3
MOST_E5M6 = tl.constexpr(65024.0)
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def scales_of(amax, pow2: tl.constexpr, largest: tl.constexpr, most: tl.constexpr = MOST):
    """Multipliers of tiles with these maxima, and the scales that dequantise them. NaN counts as no maximum.

    `largest` is the finite maximum of the input's type, `most` that of the format. Powers of two are made without a
    division: 448 is 1.75 * 2^8, so 448 / (m 2^e) with m in [1, 2) lies between 2^(8-e) and its double where m is at
    most 1.75, else one binade below. 65024 is 1.984375 * 2^15.
    """
    plain = ~(amax > 0.0) | (amax == INFINITY)  # the maximum of a tile of NaN alone is NaN
    if pow2:
        bits = amax.to(tl.int32, bitcast=True)
        highest: tl.constexpr = 262 if most == 448.0 else 269  # 254 and the exponent of `most`
        mantissa: tl.constexpr = 0x600000 if most == 448.0 else 0x7E0000
        field = highest - (bits >> 23) - ((bits & 0x7FFFFF) > mantissa).to(tl.int32)
        # A quotient that overflows becomes 2^127, whose inverse is subnormal.
        field = tl.where(plain, 127, tl.minimum(field, 254))
        inverse = tl.where(field == 254, 0x400000, (254 - field) << 23)
        return (field << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    else:
        multiplier = tl.where(plain, 1.0, tl.minimum(tl.div_rn(most, amax), largest))
        return multiplier, tl.div_rn(1.0, multiplier)


@triton.jit
def tell(values, met):
    """Set the int32 at `met` to 1 where a value of the FP32 block is infinite or NaN. All writers write 1."""
    wrong = ((values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32)
    tl.store(met, 1, mask=tl.max(tl.max(wrong, axis=1), axis=0) > 0)


@triton.jit
def store_rows(
    values,
    codes,
    scales,
    row,
    row_inside,
    column,
    column_inside,
    width,
    tiles,
    tile,
    pow2: tl.constexpr,
    largest: tl.constexpr,
):
    """Quantise FP32 values `[rows, 128]`, one tile per row: codes `[., width]`, scales `[., tiles]` at `tile`.

    Values outside are zero.
    """
    multiplier, scale = scales_of(tl.max(tl.abs(values), axis=1), pow2, largest)
    tl.store(scales + row.to(tl.int64) * tiles + tile, scale, mask=row_inside)
    encoded = (values * multiplier[:, None]).to(tl.float8e4nv)
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(codes + row[:, None].to(tl.int64) * width + column[None, :], encoded, mask=inside)


@triton.jit
def store_columns(
    values,
    codes,
    scales,
    row,
    row_inside,
    column,
    column_inside,
    height,
    width,
    tile,
    pow2: tl.constexpr,
    largest: tl.constexpr,
):
    """Quantise FP32 values `[128, columns]`, one tile per column, transposed: codes `[width, height]`.

    Scales are `[., width]`; the scales of these tiles are written at row `tile`. Values outside are zero.
    """
    multiplier, scale = scales_of(tl.max(tl.abs(values), axis=0), pow2, largest)
    tl.store(scales + tile.to(tl.int64) * width + column, scale, mask=column_inside)
    encoded = (values * multiplier[None, :]).to(tl.float8e4nv)
    inside = row_inside[:, None] & column_inside[None, :]
    # Transposed addresses, not tl.trans of codes: Triton 3.7.1 corrupts those (mlc-ai/pith-train pull request 74).
    tl.store(codes + column[None, :].to(tl.int64) * height + row[:, None], encoded, mask=inside)


@triton.jit
def bounds_of_tile(table, rows, tile, groups: tl.constexpr):
    """The first row of tile number `tile`, counted down, and the end of its at most 128 rows, int32.

    `groups` is 0 without groups. Otherwise it divides the first rows and ends in `table` `[tiles, 2]`.
    """
    if groups > 0:
        first = tl.multiple_of(tl.load(table + 2 * tile), groups)
        end = tl.multiple_of(tl.load(table + 2 * tile + 1), groups)
    else:
        first = tile * SIDE
        end = tl.minimum(first + SIDE, rows)
    return first, end
