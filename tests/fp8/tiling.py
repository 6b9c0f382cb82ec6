"""Tiles of a matrix one by one, as plain slices: the slow way that `fp8/tiles.py` is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from counterflow.tests.fp8 import oracle


def tiles_of(shape: tuple[int, int], tile: tuple[int, int]) -> Iterator[tuple[int, int, slice, slice]]:
    """Index of each tile down and across, its rows and its columns."""
    for i in range(math.ceil(shape[0] / tile[0])):
        for j in range(math.ceil(shape[1] / tile[1])):
            rows = slice(i * tile[0], min(shape[0], (i + 1) * tile[0]))
            yield i, j, rows, slice(j * tile[1], min(shape[1], (j + 1) * tile[1]))


def fp32_bits(x: Tensor) -> np.ndarray:
    return x.float().contiguous().numpy().view(np.uint32)


def oracle_quantize(x: Tensor, tile: tuple[int, int], fmt: str, pow2: bool) -> tuple[Tensor, Tensor]:
    """Unscaled values FP64 and scales FP32 of a finite matrix by the oracle, padding partial tiles with zeros."""
    rows, columns = x.shape
    down, across = math.ceil(rows / tile[0]), math.ceil(columns / tile[1])
    padded = np.zeros((down * tile[0], across * tile[1]), np.uint32)
    padded[:rows, :columns] = fp32_bits(x)
    in_tiles = padded.reshape(down, tile[0], across, tile[1]).transpose(0, 2, 1, 3)
    made = oracle.quantize_tiles(in_tiles.reshape(down * across, -1), fmt, pow2, 8 * x.element_size())
    values = made.values.reshape(in_tiles.shape).transpose(0, 2, 1, 3).reshape(padded.shape)[:rows, :columns]
    return torch.from_numpy(values.copy()), torch.from_numpy(made.scale.reshape(down, across))


def code_values(fmt: str) -> Tensor:
    """The FP64 value of every code of E4M3 or E5M2, from the formats' definitions."""
    exponent_bits, mantissa_bits = {"e4m3": (4, 3), "e5m2": (5, 2), "e5m6": (5, 6)}[fmt]
    bias, top = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    values = []
    for code in range(2 ** (1 + exponent_bits + mantissa_bits)):
        mantissa, field = code % 2**mantissa_bits, code >> mantissa_bits & top
        value = math.ldexp(mantissa + 2**mantissa_bits * (field > 0), max(field, 1) - bias - mantissa_bits)
        if field == top and (fmt != "e4m3" or mantissa == 7):
            value = math.inf if fmt != "e4m3" and mantissa == 0 else math.nan
        values.append(math.copysign(value, -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0))
    return torch.tensor(values, dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values with equal signs, zeros included; NaN equals NaN."""
    nan = a.isnan() & b.isnan()
    return a.shape == b.shape and bool((((a == b) & (a.signbit() == b.signbit())) | nan).all())
