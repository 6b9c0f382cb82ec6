"""Number formats of FP8 training: rounding of values, their layout in memory, and scales of eight bits.

| format | sign, exponent, mantissa | bias | largest | special values |
| --- | --- | --- | --- | --- |
| E4M3 | 1, 4, 3 | 7 | 448 | no infinity; NaN is 0x7F and 0xFF (OCP's OFP8, torch.float8_e4m3fn) |
| E5M2 | 1, 5, 2 | 15 | 57344 | infinity and NaN as in IEEE 754 (torch.float8_e5m2) |
| E5M6 | 1, 5, 6 | 15 | 65024 | infinity and NaN as in IEEE 754; twelve bits |
| UE8M0 | 0, 8, 0 | 127 | 2^127 | scales only; code c is 2^(c-127), 0xFF is NaN |

E5M6 is DeepSeek-V3's format for the output of attention (V3 §3.3.3), and its layout is not published. Ours, like
E5M2, is the leading bits of FP16, here twelve. A row of K values takes K bytes with each value's upper eight bits
(its E5M2, truncated), then ceil(K/2) bytes with the lower four bits: byte j has value j's in its lower half and value
ceil(K/2)+j's in its upper half, zero where there is none. Both parts are contiguous, so they vectorise.

Rounding is to the nearest, ties to even. A value that is too large, infinities included, becomes the largest finite
value of its sign, as in the conversions of NVIDIA's GPUs with SATFINITE. PyTorch 2.13's cast on a CPU does so for
E4M3 but not for E5M2, and its cast from E4M3 takes 3 ns per value, compared with 0.4 for `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import UsageError
from .tensor_formats import FormatName

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of tensors in high precision, by their names in the configuration."""


@dataclass(frozen=True)
class Format:
    """A floating-point format: `max` is the largest finite value, `min_exponent` belongs to the smallest normal."""

    name: FormatName
    mantissa_bits: int
    min_exponent: int
    max: float
    dtype: torch.dtype  # of the tensor that holds encoded values

    def bytes_per_row(self, width: int) -> int:
        """Elements of `dtype` that hold a row of `width` values."""
        return width if self.name != "e5m6" else width + (width + 1) // 2


FORMATS: dict[str, Format] = {
    "e4m3": Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn),
    "e5m2": Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2),
    "e5m6": Format("e5m6", 6, -14, 65024.0, torch.uint8),
}
_EXPONENT = 0x7F800000  # of FP32
_SUBNORMAL_SCALE = 2.0**-127  # the one power of two of UE8M0 that FP32 holds as a subnormal


def find_format(name: str) -> Format:
    """The format called `name`. Raises UsageError for any other name."""
    if name not in FORMATS:
        raise UsageError(f"there is no FP8 format {name!r}: take one of {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to(values: Tensor, fmt: Format) -> Tensor:
    """FP32 values rounded to those of `fmt`, saturated, still FP32; NaN stays NaN."""
    values = values.clamp(-fmt.max, fmt.max)
    power = (values.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(2.0**fmt.min_exponent)
    # FP32 near this multiple of the value's power of two is spaced as `fmt` is near the value: adding rounds.
    magic = 1.5 * 2.0 ** (23 - fmt.mantissa_bits)
    rounded = torch.add(values, power, alpha=magic).sub_(power, alpha=magic)
    return rounded.copysign_(values)  # -0 stays -0


def encode(values: Tensor, fmt: Format) -> Tensor:
    """FP32 values `[..., K]` rounded to `fmt` and saturated: `[..., bytes_per_row(K)]` of `fmt.dtype`."""
    if fmt.name == "e5m6":
        return pack_e5m6(round_to(values, fmt).half())
    return values.clamp(-fmt.max, fmt.max).to(fmt.dtype)


def decode(data: Tensor, fmt: Format, width: int) -> Tensor:
    """The FP32 values `[..., width]` of encoded data, exactly."""
    values, factor = (unpack_e5m6(data, width), 1.0) if fmt.name == "e5m6" else decode_scaled(data, fmt)
    return values.float() if factor == 1 else values.float().mul_(factor)


def decode_scaled(data: Tensor, fmt: Format) -> tuple[Tensor, float]:
    """The values of E4M3 or E5M2 divided by a power of two, and this power: the cheapest exact form.

    On a CPU the values are FP16, since E4M3's bits, moved to the right places, are the bits of an FP16 number 256
    times smaller, subnormals included.
    """
    assert fmt.name != "e5m6"
    if data.device.type != "cpu":
        return data.float(), 1.0
    codes = data.view(torch.int8)
    if fmt.name == "e5m2":
        return (codes.to(torch.int16) << 8).view(torch.float16), 1.0
    if data.numel() and bool(((codes & 0x7F).amax() == 0x7F).item()):  # a NaN, which has other bits in FP16
        return data.float(), 1.0
    # The sign was copied into bits 7 to 15: shifted, bit 15 is the sign, and bit 14 must go.
    return (codes.to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16), 256.0


def pack_e5m6(values: Tensor) -> Tensor:
    """FP16 values `[..., K]` that E5M6 can hold, as uint8 `[..., K + ceil(K/2)]`."""
    bits = values.contiguous().view(torch.int16)
    width, half = bits.shape[-1], (bits.shape[-1] + 1) // 2
    packed = torch.empty(*bits.shape[:-1], width + half, dtype=torch.uint8, device=values.device)
    packed[..., :width] = (bits >> 8).to(torch.uint8)
    low = (bits >> 4) & 0xF
    packed[..., width:] = low[..., :half].to(torch.uint8)
    packed[..., width : 2 * width - half] |= (low[..., half:] << 4).to(torch.uint8)
    return packed


def unpack_e5m6(packed: Tensor, width: int) -> Tensor:
    """The FP16 values `[..., width]` of a result of `pack_e5m6`."""
    half = (width + 1) // 2
    bits = packed[..., :width].to(torch.int16) << 8
    low = packed[..., width:].to(torch.int16)
    bits[..., :half] |= (low & 0xF) << 4
    bits[..., half:] |= low[..., : width - half] & 0xF0
    return bits.view(torch.float16)


def are_powers_of_two(scale: Tensor) -> Tensor:
    """Mask of the FP32 scales that UE8M0 can hold: powers of two from 2^-127, a subnormal of FP32, to 2^127."""
    bits = scale.view(torch.int32)
    normal = (bits > 0) & (bits < _EXPONENT) & ((bits & ~_EXPONENT) == 0)
    return normal | (bits == 1 << 22)


def encode_ue8m0(scale: Tensor) -> Tensor:
    """FP32 scales that are powers of two, as uint8 of the same shape: a quarter of the bytes for the wire.

    Raises UsageError for any other scale: rounding it would change the values of its tile.
    """
    fits = are_powers_of_two(scale)
    if not bool(fits.all()):
        raise UsageError(
            f"{int((~fits).sum())} of {scale.numel()} scales are not powers of two, such as "
            f"{scale[~fits][0].item():g}: quantise with pow2_scales=True to send them as UE8M0"
        )
    return (scale.view(torch.int32) >> 23).to(torch.uint8)  # 2^-127 has an exponent field of 0, and is code 0


def decode_ue8m0(codes: Tensor) -> Tensor:
    """The FP32 scales of UE8M0 codes (uint8)."""
    scale = (codes.to(torch.int32) << 23).view(torch.float32)
    scale = torch.where(codes == 0, _SUBNORMAL_SCALE, scale)
    return torch.where(codes == 0xFF, torch.nan, scale)
