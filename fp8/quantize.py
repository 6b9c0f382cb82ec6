"""Quantise a matrix to FP8 with one scale per tile, bit for bit as Transformer Engine's block quantiser does.

For each tile, in FP32 (Transformer Engine 2.20: common/recipe/recipe_common.cuh, quantize_transpose_*_blockwise.cu):

1. amax = max |x|, at least `eps`.
2. multiplier = the format's maximum / amax, rounded once; if that overflows, the largest finite value of x's type.
3. With power-of-two scales the multiplier's mantissa is cleared. That rounds it down, so nothing saturates.
4. amax zero or infinite: multiplier = 1. A NaN takes no part in amax.
5. data = x * multiplier, rounded to nearest even and saturated. NaN stays NaN.
6. scale = 1 / multiplier, rounded once; it dequantises. The scale can be an FP32 subnormal (amax below 2.6e-36), so
   nothing here works with `torch.set_flush_denormal(True)`.

On a CPU the values decide which of several ways is the fastest. Elsewhere the host does not wait for values: the one
way that is right for all of them runs, and infinities and NaN are written to a flag on the device.

Shapes: M rows, K columns, C = ceil(K/128), R = ceil(M/128). Tiles of (1, 128) have scales `[M, C]`, (128, 1) `[R, K]`,
(128, 128) `[R, C]`. The contraction of a matrix product runs along the tiles of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import UsageError
from .number_formats import FORMATS, Format, decode_scaled, find_format, pack_e5m6, round_to, unpack_e5m6
from .tensor_formats import FormatName, Tile
from .tiles import Piece, check_tile, pieces, scale_shape

# Rounding in place adds up to 2^22 times a value, and a value is up to 2^16 times its scale. It reads the exponent
# field as the exponent down to 2^-14 of the scale. With scales between these two bounds it stays clear of both ends of
# FP32.
_SAFE_LOW, _SAFE_HIGH = 2.0**-100, 2.0**90
_EXPONENT = 0x7F800000  # of FP32


class FP8RangeError(ValueError):
    """Infinities or NaN in an input of quantisation on a CPU, raised where the caller set `checked`."""


def reads_values(device: torch.device) -> bool:
    """Whether the host may read values of tensors on `device` to choose the fastest way."""
    return device.type == "cpu"


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix `[M, K]` or a stack of them `[E, M, K]` in a low-precision format, with one scale per tile.

    `data` holds the encoded values in the shape of the matrix (E5M6: `[..., K + ceil(K/2)]` bytes, see
    `number_formats`) and `scale` the FP32 multipliers that dequantise (`[M, C]`, `[R, K]` or `[R, C]`, see this module;
    with an E in front for a stack). `ends` are the row ends of the groups where tiles begin again, or None; tiles of
    one row ignore them.
    """

    data: Tensor
    scale: Tensor
    tile: Tile
    fmt: FormatName
    width: int  # K
    pow2_scales: bool
    ends: tuple[int, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, whatever the shape of `data`."""
        return torch.Size((*self.data.shape[:-1], self.width))

    @property
    def nbytes(self) -> int:
        """Bytes held by data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, `[M, K]` or `[E, M, K]`: FP32 products of data and scale, rounded to `dtype`.

        The default `dtype` is BF16 with power-of-two scales, where BF16 is exact (no format has more than seven
        significant bits), and FP32 otherwise. BF16 has no values below 2^-133: tiles with scales below 2^-113 can lose
        their smallest.
        """
        dtype = dtype or (torch.bfloat16 if self.pow2_scales else torch.float32)
        if self.ends is None and not self.data.is_contiguous() and self.data.mT.is_contiguous():
            return self.transpose().dequantize(dtype).mT
        data = unpack_e5m6(self.data, self.width) if self.fmt == "e5m6" else self.data
        values = torch.empty(self.shape, dtype=dtype, device=data.device)
        data, scale, flat = data.flatten(0, -2), self.scale.flatten(0, -2), values.flatten(0, -2)
        for piece in pieces(_segments(self.shape, self.ends), self.width, self.tile, data.device):
            _decode(piece.of(data), piece.of_scales(scale), FORMATS[self.fmt], piece.of(flat))
        return values

    def transpose(self) -> BlockQuantized:
        """The exact transposed matrix: a view whose tiles are transposed, too. Not for E5M6 or groups of rows."""
        if self.fmt == "e5m6" or self.ends is not None:
            what = "E5M6 packs values along rows" if self.fmt == "e5m6" else "its rows are in groups"
            raise UsageError(f"this matrix has no transposed view, because {what}: take requantize or dequantize")
        turned = self.data.mT
        return replace(
            self, data=turned, scale=self.scale.mT, tile=(self.tile[1], self.tile[0]), width=turned.shape[-1]
        )

    def requantize(
        self,
        tile: Tile = (128, 1),
        fmt: FormatName = "e4m3",
        pow2_scales: bool | None = None,
        offsets: Tensor | Sequence[int] | None = None,
    ) -> BlockQuantized:
        """Dequantise and quantise in other tiles, as V3 does with cached activations for W (§3.5.2).

        With power-of-two scales on both sides a value changes only where its new tile's step is coarser than its own.
        The kind of scales stays unless it is given; `offsets` as in `quantize`.
        """
        kind = self.pow2_scales if pow2_scales is None else pow2_scales
        return quantize(self.dequantize(), tile, fmt, kind, offsets=offsets)

    def without_tensors(self) -> Callable[[Tensor, Tensor], BlockQuantized]:
        """A function that makes this matrix from its data and scale, for callers that keep both elsewhere."""
        tile, fmt, width, pow2, ends = self.tile, self.fmt, self.width, self.pow2_scales, self.ends
        return lambda data, scale: BlockQuantized(data, scale, tile, fmt, width, pow2, ends)

    def group(self, index: int) -> BlockQuantized:
        """The rows of one group, or one matrix of a stack: views."""
        if self.data.dim() == 3:
            return replace(self, data=self.data[index], scale=self.scale[index])
        assert self.ends is not None, "a matrix without groups"
        counts = _segments(self.shape, self.ends)
        first, scale_first = sum(counts[:index]), scale_shape(counts[:index], self.width, self.tile)[0]
        scale_rows = scale_shape(counts[index : index + 1], self.width, self.tile)[0]
        return replace(
            self,
            data=self.data[first : first + counts[index]],
            scale=self.scale[scale_first : scale_first + scale_rows],
            ends=None,
        )


class _Rule(NamedTuple):
    """Rules of one quantisation."""

    tile: Tile
    fmt: Format
    pow2_scales: bool
    checked: bool
    eps: float
    met: Tensor | None
    """int32 `[1]`, set to 1 where infinities or NaN are met."""


def quantize(
    x: Tensor,
    tile: Tile = (1, 128),
    fmt: FormatName = "e4m3",
    pow2_scales: bool = True,
    checked: bool = False,
    *,
    eps: float = 0.0,
    offsets: Tensor | Sequence[int] | None = None,
    met: Tensor | None = None,
) -> BlockQuantized:
    """Quantise x `[M, K]` or a stack `[E, M, K]`, BF16 or FP32; rules and shapes are in the docstring of this module.

    `offsets` `[E]` are the ends of groups of rows, as in `GroupedLinear`: tiles of 128 rows begin again with each
    group, so no tile belongs to two experts. `eps` is the least amax (Transformer Engine's amax_epsilon;
    DeepSeek's inference kernels use 1e-4). `checked` raises FP8RangeError for infinities and NaN on a CPU. Without
    it, and elsewhere, they set `met` int32 `[1]` to 1.
    Raises UsageError for a tile, format, shape or type that is not supported.
    """
    return _quantize(x, _rule(tile, fmt, pow2_scales, checked, eps, met), offsets, None)


def quantize_with_values(
    x: Tensor,
    tile: Tile = (1, 128),
    fmt: FormatName = "e4m3",
    pow2_scales: bool = True,
    checked: bool = False,
    *,
    eps: float = 0.0,
    offsets: Tensor | Sequence[int] | None = None,
    met: Tensor | None = None,
) -> tuple[BlockQuantized, Tensor]:
    """Result of `quantize`, to keep, and its dequantised values, to compute with, from the same pass."""
    values = torch.empty(x.shape, dtype=torch.bfloat16 if pow2_scales else torch.float32, device=x.device)
    return _quantize(x, _rule(tile, fmt, pow2_scales, checked, eps, met), offsets, values), values


def fake_quantize(
    x: Tensor,
    tile: Tile = (1, 128),
    fmt: FormatName = "e4m3",
    pow2_scales: bool = True,
    checked: bool = False,
    *,
    eps: float = 0.0,
    offsets: Tensor | Sequence[int] | None = None,
    met: Tensor | None = None,
) -> Tensor:
    """Values of `quantize(…).dequantize()`, without encoding: BF16 with power-of-two scales, else FP32.

    Only the sign of zeros may differ.
    """
    rule = _rule(tile, fmt, pow2_scales, checked, eps, met)
    matrix, ends = _matrix(x, offsets)
    values = torch.empty(x.shape, dtype=torch.bfloat16 if pow2_scales else torch.float32, device=x.device)
    flat = values.view(matrix.shape)
    for piece in pieces(_segments(x.shape, ends), matrix.shape[1], rule.tile, x.device):
        tiles = piece.of(matrix)
        amax, finite = _largest(tiles, rule, piece)
        multiplier, scale = _scales(amax, rule, x.dtype)
        if pow2_scales and finite and _are_safe(scale):
            _round_in_place(tiles, scale, rule.fmt, piece.of(flat))
        else:
            torch.mul(round_to(_product(tiles, multiplier), rule.fmt), scale, out=piece.of(flat))
    return values


def _quantize(x: Tensor, rule: _Rule, offsets: Tensor | Sequence[int] | None, values: Tensor | None) -> BlockQuantized:
    matrix, ends = _matrix(x, offsets)
    segments, width = _segments(x.shape, ends), matrix.shape[1]
    packs = rule.fmt.name == "e5m6"
    data = torch.empty(matrix.shape, dtype=torch.float16 if packs else rule.fmt.dtype, device=x.device)
    scale = torch.empty(scale_shape(segments, width, rule.tile), dtype=torch.float32, device=x.device)
    flat = None if values is None else values.view(matrix.shape)
    for piece in pieces(segments, width, rule.tile, x.device):
        tiles, codes, scales = piece.of(matrix), piece.of(data), piece.of_scales(scale)
        amax, finite = _largest(tiles, rule, piece)
        multiplier, inverse = _scales(amax, rule, x.dtype)
        scales.copy_(inverse)
        scaled = _product(tiles, multiplier)
        if packs:
            scaled = round_to(scaled, rule.fmt)
        elif not finite:  # all other values round to at most the maximum
            scaled.clamp_(-rule.fmt.max, rule.fmt.max)
        codes.copy_(scaled)
        if flat is not None:
            _decode(codes, scales, rule.fmt, piece.of(flat))
    if packs:
        data = pack_e5m6(data)
    return BlockQuantized(
        data.view(*x.shape[:-1], rule.fmt.bytes_per_row(width)),
        scale if x.dim() == 2 else scale.view(x.shape[0], *scale_shape((x.shape[1],), width, rule.tile)),
        rule.tile,
        rule.fmt.name,
        width,
        rule.pow2_scales,
        ends,
    )


def _largest(tiles: Tensor, rule: _Rule, piece: Piece) -> tuple[Tensor, bool]:
    """The amax of each tile without NaN, FP32 `[tiles down, 1, tiles across, 1]`, and whether all elements are known to
    be finite.

    Without their sign, the bits of floating-point numbers have the order of the numbers, and integers compare faster.
    """
    bits, infinity = (
        (tiles.view(torch.int16) & 0x7FFF, 0x7F80) if tiles.dtype == torch.bfloat16
        else (tiles.view(torch.int32) & 0x7FFFFFFF, 0x7F800000)
    )  # fmt: skip
    amax = _amax(bits)
    if not reads_values(tiles.device):
        if rule.met is not None:
            torch.maximum(rule.met, (amax.max() >= infinity).to(torch.int32), out=rule.met)
        return _amax(bits.masked_fill_(bits > infinity, 0)).view(tiles.dtype).float(), False
    finite = bool((amax.max() < infinity).item())
    if not finite:
        if rule.checked:
            raise FP8RangeError(_describe(bits, infinity, piece))
        if rule.met is not None:
            rule.met.fill_(1)
        amax = _amax(bits.masked_fill_(bits > infinity, 0))
    return amax.view(tiles.dtype).float(), finite


def _amax(bits: Tensor) -> Tensor:
    across = bits.amax(3, keepdim=True) if bits.shape[3] > 1 else bits
    return across.amax(1, keepdim=True) if bits.shape[1] > 1 else across


def _describe(bits: Tensor, infinity: int, piece: Piece) -> str:
    flat = bits.flatten(2).flatten(0, 1)
    row, column = (flat >= infinity).nonzero()[0].tolist()
    return (
        f"{int((flat > infinity).sum())} NaN and {int((flat == infinity).sum())} infinities in rows "
        f"{piece.rows.start} to {piece.rows.stop - 1} of a matrix to quantise, the first in row "
        f"{piece.rows.start + row}, column {piece.columns.start + column}"
    )


def _scales(amax: Tensor, rule: _Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Multiplier and its inverse of each tile."""
    if rule.eps > 0:
        amax = amax.clamp_min(rule.eps)
    # Not `rule.fmt.max / amax`: torch multiplies by the reciprocal there, which rounds twice.
    multiplier = (amax.new_full((), rule.fmt.max) / amax).clamp_max_(torch.finfo(dtype).max)
    if rule.pow2_scales:
        multiplier = (multiplier.view(torch.int32) & _EXPONENT).view(torch.float32)
    multiplier.masked_fill_((amax == 0) | (amax == torch.inf), 1.0)
    return multiplier, multiplier.reciprocal()


def _product(tiles: Tensor, multiplier: Tensor) -> Tensor:
    """Product in FP32. Converting first takes three quarters of the time of a product of two types."""
    return tiles * multiplier if tiles.dtype == torch.float32 else tiles.float().mul_(multiplier)


def _are_safe(scale: Tensor) -> bool:
    low, high = (bound.item() for bound in scale.aminmax())
    return low >= _SAFE_LOW and high <= _SAFE_HIGH


def _round_in_place(tiles: Tensor, scale: Tensor, fmt: Format, out: Tensor) -> None:
    """Round values to multiples of the steps that their tile's power-of-two scale allows, without applying it.

    A value's step is the step at its own power of two, or at the format's smallest normal number times the scale.
    Near 1.5 * 2^23 steps FP32 is spaced by one step: adding this number and subtracting it rounds to nearest even.
    """
    wide = tiles.to(torch.float32, copy=True)
    power = (wide.view(torch.int32) & _EXPONENT).view(torch.float32)
    torch.maximum(power, scale * 2.0**fmt.min_exponent, out=power)
    magic = 1.5 * 2.0 ** (23 - fmt.mantissa_bits)
    out.copy_(wide.add_(power, alpha=magic).sub_(power, alpha=magic))


def _decode(codes: Tensor, scale: Tensor, fmt: Format, out: Tensor) -> None:
    """Write the products of encoded values and FP32 scale to `out`."""
    values, factor = (codes, 1.0) if codes.dtype == torch.float16 else decode_scaled(codes, fmt)
    wide = values.float()  # always a copy: no code is FP32
    if factor != 1.0:
        # Both ways are exact, but `scale * factor` overflows for the largest scales.
        if reads_values(codes.device) and bool((scale.max() < 2.0**119).item()):
            scale = scale * factor
        else:
            wide.mul_(factor)
    out.copy_(wide.mul_(scale))


def _rule(tile: Tile, fmt: FormatName, pow2_scales: bool, checked: bool, eps: float, met: Tensor | None) -> _Rule:
    return _Rule(check_tile(tile), find_format(fmt), pow2_scales, checked, eps, met)


def _matrix(x: Tensor, offsets: Tensor | Sequence[int] | None) -> tuple[Tensor, tuple[int, ...] | None]:
    """x as one matrix of all rows, and the ends of its groups."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise UsageError(f"cannot quantise {x.dtype}: give BF16 or FP32")
    if x.dim() not in (2, 3):
        raise UsageError(f"cannot quantise a tensor of shape {tuple(x.shape)}: give [rows, columns] or a stack of them")
    matrix = x.detach().flatten(0, -2)
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    if offsets is None:
        return matrix, None
    ends = tuple(int(end) for end in (offsets.tolist() if isinstance(offsets, Tensor) else offsets))
    rising = all(a <= b for a, b in zip((0, *ends), ends, strict=False))
    if x.dim() == 3 or not rising or (ends[-1] if ends else 0) != x.shape[0]:
        raise UsageError(
            f"group ends {ends} do not divide a tensor of shape {tuple(x.shape)}: they rise to the number of rows"
        )
    return matrix, ends


def _segments(shape: torch.Size, ends: tuple[int, ...] | None) -> tuple[int, ...]:
    """Rows of each segment in which tiles begin again: groups, or matrices of a stack."""
    if len(shape) == 3:
        return (shape[1],) * shape[0]
    return (shape[0],) if ends is None else tuple(b - a for a, b in zip((0, *ends), ends, strict=False))
