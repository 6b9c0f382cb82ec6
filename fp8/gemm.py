"""Matrix products of block-quantised operands: the three of a linear layer, plain or grouped by expert.

| product | operands and their tiles | result |
| --- | --- | --- |
| fprop | x `[T, K]` (1, 128), w `[N, K]` (128, 128) | y = x w^T `[T, N]` |
| dgrad | dy `[T, N]` (1, 128), w `[N, K]` (128, 128) | dx = dy w `[T, K]` |
| wgrad | dy `[T, N]` (128, 1), x `[T, K]` (128, 1) | dw = dy^T x `[N, K]` |

Scales must change only every 128 elements along the contraction, so any operand may have tiles of (128, 128) instead,
and no operand may have tiles of 128 across the contraction. T tokens, K inputs, N outputs. Grouped, w and dw are stacks
`[E, N, K]` and `offsets` `[E]` int32 are the ends of the experts' rows.

The products are computed in one of two ways. `promoted` is the definition: for every 128 elements a partial sum of the
unscaled values, exact and rounded once to FP32, then scaled and added to the result in FP32, in ascending order (V3
§3.3.2). `fast` is one product of the dequantised values: in BF16 where all scales are powers of two, since the values
are then exact in BF16, else in FP32. Its results differ from those of `promoted` only by the order of FP32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..settings import UsageError
from .number_formats import FORMATS, decode
from .products import Products
from .quantize import BlockQuantized
from .tensor_formats import SIDE

Mode = Literal["fast", "promoted"]
Operand = BlockQuantized | Tensor  # a tensor holds values already dequantised or fake-quantised, for `fast` alone


@dataclass(frozen=True)
class Accumulator:
    """Model of a tensor core's sums: `step` products at once, aligned to the largest one and truncated.

    The exponents of the products and of the running sum are compared; all are truncated towards zero to
    `fraction_bits` binary places of the largest, added exactly, and the sum is truncated to as many places, counted
    from its own exponent.
    """

    fraction_bits: int
    step: int


# "FP22": V3 §3.3.2 and DeepSeek's ISCA paper §3.1.1. That the running sum takes part in the alignment is from Khattak
# and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv:2512.07004). Equal to PyPI's mmaemu 0.1.0, "hopper".
HOPPER = Accumulator(fraction_bits=13, step=32)


def fprop(
    x: Operand,
    w: Operand,
    *,
    offsets: Tensor | None = None,
    ends: Sequence[int] | None = None,
    mode: Mode = "fast",
    out_dtype: torch.dtype = torch.bfloat16,
    accumulator: Accumulator | None = None,
    products: Products | None = None,
) -> Tensor:
    """`x w^T`, `[T, N]`. `ends` are `offsets` on the host, copied from the device where they are needed and not given.
    `accumulator` is for `promoted`: partial sums are then those of a tensor core, not exact.

    Raises UsageError for shapes or tiles that do not go together.
    """
    if mode == "fast":
        return _fast(_values(x, 1), _values(w, 1).mT, offsets, ends, out_dtype, products)
    left, right = _encoded(x, w)
    if offsets is None:
        return promoted(left, right, out_dtype, accumulator)
    parts = _groups(left, right, _on_host(offsets, ends))
    return torch.cat([promoted(a, b, out_dtype, accumulator) for a, b in parts])


def dgrad(
    dy: Operand,
    w: Operand,
    *,
    offsets: Tensor | None = None,
    ends: Sequence[int] | None = None,
    mode: Mode = "fast",
    out_dtype: torch.dtype = torch.bfloat16,
    accumulator: Accumulator | None = None,
    products: Products | None = None,
) -> Tensor:
    """`dy w`, `[T, K]`; the rest as `fprop`."""
    if mode == "fast":
        return _fast(_values(dy, 1), _values(w, 0), offsets, ends, out_dtype, products)
    left, right = _encoded(dy, w)
    if offsets is None:
        return promoted(left, right.transpose(), out_dtype, accumulator)
    parts = _groups(left, right, _on_host(offsets, ends))
    return torch.cat([promoted(a, b.transpose(), out_dtype, accumulator) for a, b in parts])


def wgrad(
    dy: Operand,
    x: Operand,
    *,
    offsets: Tensor | None = None,
    ends: Sequence[int] | None = None,
    mode: Mode = "fast",
    out_dtype: torch.dtype = torch.bfloat16,
    accumulator: Accumulator | None = None,
    products: Products | None = None,
) -> Tensor:
    """`dy^T x`, `[N, K]`, or `[E, N, K]` with `offsets`; the rest as `fprop`.

    Grouped operands must be quantised with the same offsets, so that no tile spans two experts.
    """
    if offsets is not None:
        _check_groups((dy, x), _on_host(offsets, ends))
    if mode == "fast":
        return _fast(_values(dy, 0).mT, _values(x, 0), offsets, ends, out_dtype, products)
    left, right = _encoded(dy, x)
    if offsets is None:
        return promoted(left.transpose(), right.transpose(), out_dtype, accumulator)
    parts = _groups(left, right, _on_host(offsets, ends))
    return torch.stack([promoted(a.transpose(), b.transpose(), out_dtype, accumulator) for a, b in parts])


def promoted(
    a: BlockQuantized, b: BlockQuantized, out_dtype: torch.dtype, accumulator: Accumulator | None = None
) -> Tensor:
    """`a b^T` `[M, N]` of a `[M, K]` and b `[N, K]`, both with tiles along K, promoted to FP32 every 128 elements.

    A partial sum p becomes `y = fma(p * first, second, y)`. As in Transformer Engine's reference, `first` is the scale
    of a, or the scale of b where only a's tiles are square. Where the tiles of both are square, `second` is the product
    of the scales and `first` is 1. With power-of-two scales the order does not matter.
    """
    for operand in (a, b):
        _check(operand, 1)
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"cannot contract {a.shape[1]} columns with {b.shape[1]}")
    left, right = (decode(q.data, FORMATS[q.fmt], q.width) for q in (a, b))
    least = FORMATS[a.fmt].min_exponent, FORMATS[b.fmt].min_exponent
    result = torch.zeros(a.shape[0], b.shape[0], device=left.device)
    for tile, start in enumerate(range(0, a.shape[1], SIDE)):
        part = slice(start, start + SIDE)
        if accumulator is None:
            # 128 products of E4M3 values span 43 bits: FP64 adds them exactly in any order.
            partial = (left[:, part].double() @ right[:, part].double().T).float()
        else:
            partial = _accumulate(left[:, part], right[:, part], accumulator, least)
        first, second = _row_scales(a, tile).unsqueeze(1), _row_scales(b, tile)
        if a.tile[0] == SIDE:
            first, second = (second, first) if b.tile[0] == 1 else (torch.ones_like(first), first * second)
        # FP64 holds this product of FP32 numbers exactly.
        result = ((partial * first).double() * second.double() + result.double()).float()
    return result.to(out_dtype)


def accumulate(a: BlockQuantized, b: BlockQuantized, accumulator: Accumulator) -> Tensor:
    """`a b^T` `[M, N]` FP32 of unscaled values, a `[M, K]` and b `[N, K]`, summed over all of K as by a tensor core.

    The computation takes memory for M x N x step values.
    """
    left, right = (decode(q.data, FORMATS[q.fmt], q.width) for q in (a, b))
    return _accumulate(left, right, accumulator, (FORMATS[a.fmt].min_exponent, FORMATS[b.fmt].min_exponent))


def _accumulate(a: Tensor, b: Tensor, accumulator: Accumulator, least: tuple[int, int]) -> Tensor:
    """`least` are the exponents of the formats' smallest normal numbers, which subnormal numbers are aligned to."""
    bits = accumulator.fraction_bits
    exponent_a, exponent_b = _exponent(a, least[0]), _exponent(b, least[1])
    total = a.new_zeros(a.shape[0], b.shape[0])
    for start in range(0, a.shape[1], accumulator.step):
        part = slice(start, start + accumulator.step)
        largest = (exponent_a[:, None, part] + exponent_b[None, :, part]).amax(-1)
        # An exponent field of at least 1 keeps the spacing a normal number; for all-zero steps any spacing will do.
        spacing = _power(torch.maximum(largest, _exponent(total)).clamp_min(-100) - bits)
        products = a[:, None, part] * b[None, :, part]
        units = (products / spacing.unsqueeze(-1)).trunc_().sum(-1) + (total / spacing).trunc_()
        total = units * spacing  # below 2^20 units: exact
        spacing = _power(_exponent(total).clamp_min(-100) - bits)
        total = (total / spacing).trunc_() * spacing
    return total


def _row_scales(q: BlockQuantized, tile: int) -> Tensor:
    """The scales of one tile along K, one per row."""
    scale = q.scale[:, tile]
    return scale if q.tile[0] == 1 else scale.repeat_interleave(SIDE)[: q.shape[0]]


_ZERO_EXPONENT = -(2**20)  # of a zero: smaller than any other exponent, and sums of two do not overflow


def _exponent(values: Tensor, least: int = -126) -> Tensor:
    """floor(log2 |value|) of normal FP32 numbers as int32, at least `least` except for zeros."""
    field = (values.view(torch.int32) >> 23) & 0xFF
    return torch.where(values == 0, _ZERO_EXPONENT, (field - 127).clamp_min_(least))


def _power(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _fast(
    left: Tensor,
    right: Tensor,
    offsets: Tensor | None,
    ends: Sequence[int] | None,
    out_dtype: torch.dtype,
    products: Products | None,
) -> Tensor:
    """`left right`, grouped by rows of left where right is a stack, or by the contraction where right is a matrix."""
    if left.dtype != right.dtype or (out_dtype == torch.float32 and left.dtype != out_dtype):
        left, right = left.float(), right.float()  # a BF16 product would round its result to BF16
    inner = right.shape[-2]
    if left.shape[-1] != inner:
        raise UsageError(f"cannot contract {left.shape[-1]} columns with {inner}")
    return (products or Products()).multiply(left, right, offsets, ends).to(out_dtype)


def _values(operand: Operand, contracted: int) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    _check(operand, contracted)
    return operand.dequantize()


def _encoded(*operands: Operand) -> tuple[BlockQuantized, BlockQuantized]:
    left, right = operands
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        raise UsageError("the promoted product needs both operands quantised, and was given values: take mode fast")
    return left, right


def _check(operand: BlockQuantized, contracted: int) -> None:
    """Raise UsageError unless scales change only every 128 elements along dimension `contracted` of the matrix."""
    if operand.tile[contracted] != SIDE:
        raise UsageError(
            f"tiles of {operand.tile} cannot be contracted along {('rows', 'columns')[contracted]} of a matrix "
            f"{tuple(operand.shape)}: quantise it in tiles of {((SIDE, 1), (1, SIDE))[contracted]} or {(SIDE, SIDE)}"
        )


def _on_host(offsets: Tensor, ends: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(offsets.tolist() if ends is None else ends)


def _check_groups(operands: tuple[Operand, ...], ends: tuple[int, ...]) -> None:
    for operand in operands:
        if isinstance(operand, BlockQuantized) and operand.ends != ends:
            raise UsageError(
                f"an operand whose tiles begin anew at rows {operand.ends} cannot be contracted in groups that end at "
                f"{ends}: quantise it with these offsets"
            )


def _groups(
    left: BlockQuantized, right: BlockQuantized, ends: tuple[int, ...]
) -> list[tuple[BlockQuantized, BlockQuantized]]:
    """Each group's rows of left, and its rows or its matrix of right."""
    if left.tile[0] == 1:  # tiles of one row are the same with any groups
        left = replace(left, ends=ends)
    elif left.ends != ends:
        _check_groups((left,), ends)
    return [(left.group(index), right.group(index)) for index, _ in enumerate(pairwise((0, *ends)))]
