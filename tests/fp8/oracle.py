"""Block quantisation in integer arithmetic: numbers are `significand * 2^exponent` in int64, and nothing is a float.

Follows the rules in `fp8/quantize.py` one after the other, without tensors or rounding by a processor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Largest finite value as (significand, exponent), bits of significand, exponent of the smallest step.
FORMATS = {"e4m3": (7, 6, 4, -9), "e5m2": (7, 13, 3, -16), "e5m6": (127, 9, 7, -20)}
LARGEST_INPUT = {16: (255, 120), 32: (2**24 - 1, 104)}  # of BF16 and FP32


class Number(NamedTuple):
    significand: Ints  # not negative
    exponent: Ints


def bit_length(n: Ints) -> Ints:
    assert n.size == 0 or int(n.max()) < 2**62
    high = n >> 31  # each half is exact in FP64
    lengths = [np.frexp(half.astype(np.float64))[1] for half in (high, n & (2**31 - 1))]
    return np.where(high > 0, lengths[0] + 31, lengths[1]).astype(np.int64)


def round_even(x: Number, bits: int, least: int) -> Number:
    """x rounded to `bits` bits of significand, and to steps of at least 2^least."""
    drop = np.maximum(np.maximum(bit_length(x.significand) - bits, least - x.exponent), 0)
    drop = np.minimum(drop, 62)
    kept = x.significand >> drop
    rest = x.significand - (kept << drop)
    half = (1 << drop) >> 1
    up = (drop > 0) & ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    return Number(kept + up, x.exponent + drop)


def divide(numerator: int, exponent: int, by: Number) -> Number:
    """`numerator * 2^exponent / by` rounded to FP32; numerator is below 2^7, `by` positive and below 2^24."""
    shift = 24 - bit_length(by.significand)  # so that the quotient has at least 28 bits
    dividend = np.int64(numerator) << 53
    quotient, rest = np.divmod(dividend, by.significand << shift)
    sticky = 2 * quotient + (rest > 0)
    return round_even(Number(sticky, exponent - 54 - by.exponent + shift), 24, -149)


def unpack(bits: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], Number]:
    """Sign and magnitude of finite FP32 numbers."""
    field = ((bits >> 23) & 0xFF).astype(np.int64)
    fraction = (bits & 0x7FFFFF).astype(np.int64)
    magnitude = Number(np.where(field > 0, fraction | 2**23, fraction), np.maximum(field, 1) - 150)
    return (bits >> 31).astype(bool), magnitude


def pack(x: Number) -> NDArray[np.float32]:
    """x as FP32, which must hold it exactly."""
    wide = np.ldexp(x.significand.astype(np.float64), x.exponent)
    narrow = wide.astype(np.float32)
    assert (narrow == wide).all()
    return narrow


class Quantized(NamedTuple):
    values: NDArray[np.float64]  # values of the codes, before the scale; signed zeros
    scale: NDArray[np.float32]


def quantize_tiles(bits: NDArray[np.uint32], fmt: str, pow2: bool, input_bits: int) -> Quantized:
    """Quantise tiles `[tiles, elements]`: bits of finite FP32 numbers, converted from a type of `input_bits` bits."""
    most, most_exponent, precision, least = FORMATS[fmt]
    sign, x = unpack(bits)
    _, amax = unpack((bits & 0x7FFFFFFF).max(1))
    zero = amax.significand == 0
    multiplier = divide(most, most_exponent, Number(np.where(zero, 1, amax.significand), amax.exponent))
    overflows = bit_length(multiplier.significand) + multiplier.exponent > 128
    multiplier = Number(
        *(np.where(overflows, a, b) for a, b in zip(LARGEST_INPUT[input_bits], multiplier, strict=True))
    )
    if pow2:
        length = bit_length(multiplier.significand)
        multiplier = Number(np.ones_like(length), multiplier.exponent + length - 1)
    multiplier = Number(np.where(zero, 1, multiplier.significand), np.where(zero, 0, multiplier.exponent))
    scale = divide(1, 0, multiplier)
    product = Number(x.significand * multiplier.significand[:, None], x.exponent + multiplier.exponent[:, None])
    rounded = round_even(round_even(product, 24, -149), precision, least)
    values = np.ldexp(rounded.significand.astype(np.float64), rounded.exponent)
    values = np.minimum(values, most * 2.0**most_exponent)
    return Quantized(np.where(sign, -values, values), pack(scale))
