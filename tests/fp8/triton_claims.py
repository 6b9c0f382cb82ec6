"""Inputs and expected results of the fused kernels, in plain torch, for the interpreter and for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.fp8.number_formats import FORMATS, decode, round_to
from counterflow.fp8.quantize import BlockQuantized, quantize

ULP = 2.0**-23


def numbers(rows: int, columns: int, seed: int, special: bool = True) -> Tensor:
    """BF16 with wide spreads, rows of subnormals, zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[1::4] *= torch.rand(x[1::4].shape[0], 1, generator=generator).mul(276).sub(149).exp2()
    x[2::4] *= torch.rand(x[2::4].shape, generator=generator).mul(40).sub(30).exp2()
    x[:, ::7], x[:, ::14] = 0, -0.0
    x[5::40] = 0
    if special:
        x[torch.rand(x.shape, generator=generator) < 2e-4] = torch.inf
        x[torch.rand(x.shape, generator=generator) < 2e-4] = -torch.nan
        x[7, : columns // 2] = torch.nan
    else:
        x.clamp_(-1e30, 1e30)  # sums of a few stay finite
    return x.bfloat16()


def gates(rows: int, inner: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gate and up `[rows, 2 inner]`, where some gates are very large, and weights."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(rows, 2 * inner, generator=generator)
    gate_up[:, :inner:3] *= 4
    gate_up[3::16, :inner] *= 30
    return gate_up.bfloat16(), torch.rand(rows, generator=generator)


def assert_same(ours: BlockQuantized, theirs: BlockQuantized) -> None:
    """Equal codes and scales, bit for bit, but for the sign of a NaN."""
    assert (ours.shape, ours.tile, ours.fmt, ours.width, ours.pow2_scales, ours.ends) == (
        theirs.shape, theirs.tile, theirs.fmt, theirs.width, theirs.pow2_scales, theirs.ends
    )  # fmt: skip
    assert ours.scale.shape == theirs.scale.shape
    wrong_scales = (ours.scale.view(torch.int32) != theirs.scale.view(torch.int32)).sum().item()
    wrong_codes = (plain_codes(ours) != plain_codes(theirs)).sum().item()
    assert (wrong_scales, wrong_codes) == (0, 0), f"of {ours.scale.numel()} scales and {ours.data.numel()} codes"


def plain_codes(q: BlockQuantized) -> Tensor:
    """Codes as uint8, all NaN alike."""
    codes = q.data.view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


def swiglu_by(exp: Callable[[Tensor], Tensor], gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """The forward in FP32, operation by operation, rounded to BF16."""
    gate, up = gate_up.float().chunk(2, 1)
    hidden = gate * (1 / (1 + exp(-gate))) * up
    return (hidden if weights is None else hidden * weights[:, None]).bfloat16()


def swiglu_backward_by(
    exp: Callable[[Tensor], Tensor], grad: Tensor, gate_up: Tensor, weights: Tensor | None
) -> Tensor:
    """The backward for gate and up, in the same way."""
    gate, up = gate_up.float().chunk(2, 1)
    sigmoid = 1 / (1 + exp(-gate))
    grad_up = grad.float() * (gate * sigmoid)
    grad_silu = grad.float() * up
    if weights is not None:
        grad_up, grad_silu = grad_up * weights[:, None], grad_silu * weights[:, None]
    return torch.cat((grad_silu * sigmoid * (1 + gate * (1 - sigmoid)), grad_up), 1).bfloat16()


def exact_swiglu(gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """SwiGLU in FP64, and a bound of the error in FP32 if that of sigmoid is at most (5 + |x|) ulp of itself."""
    gate, up = gate_up.double().chunk(2, 1)
    factor = up if weights is None else up * weights.double()[:, None]
    exact = gate * gate.sigmoid() * factor
    return exact, exact.abs() * (8 + gate.abs()) * ULP + factor.abs() * 2.0**-118


def exact_swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.double().chunk(2, 1)
    wide = grad.double() if weights is None else grad.double() * weights.double()[:, None]
    sigmoid, off = gate.sigmoid(), (5 + gate.abs()) * ULP
    grad_up = wide * gate * sigmoid
    bracket = 1 + gate * (1 - sigmoid)
    grad_gate = wide * up * sigmoid * bracket
    bracket_off = gate.abs() * (sigmoid * off + ULP) + 2 * ULP * (1 + gate.abs())
    gate_off = (wide * up).abs() * sigmoid * (off * bracket.abs() + bracket_off) + 3 * ULP * grad_gate.abs()
    margins = torch.cat((gate_off, grad_up.abs() * (off + 3 * ULP)), 1)
    smallest = torch.cat((wide * up, wide), 1).abs() * 2.0**-118
    return torch.cat((grad_gate, grad_up), 1), margins + smallest


def assert_within(q: BlockQuantized, exact: Tensor, margin: Tensor) -> None:
    """Check that codes and power-of-two scales are those of values within the margin, rounded to BF16.

    So a code may differ from the code of the exact value only where the exact value is within the margin of a tie of
    BF16 or of E4M3.
    """
    assert q.pow2_scales
    low, high = (exact - margin).float().bfloat16().double(), (exact + margin).float().bfloat16().double()
    least = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
    most = torch.maximum(low.abs(), high.abs())
    offsets = q.ends
    scales = [quantize(bound.bfloat16(), q.tile, offsets=offsets).scale for bound in (least, most)]
    fits = (q.scale >= scales[0]) & (q.scale <= scales[1]) | (scales[0] == 1)  # 1: the tile may be all zeros
    assert bool(fits.all()), f"{int((~fits).sum())} of {fits.numel()} scales are not within the margin"
    scale = spread(q)
    fmt = FORMATS["e4m3"]
    values = decode(q.data.contiguous(), fmt, q.width).double()
    bounds = [round_to((bound / scale).clamp(-1e30, 1e30).float(), fmt).double() for bound in (low, high)]
    wrong = ~((values >= bounds[0]) & (values <= bounds[1]))
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} codes are not within the margin"


def spread(q: BlockQuantized) -> Tensor:
    """FP64 scales in the shape of the matrix."""
    ones = torch.ones(q.shape, device=q.data.device).to(torch.float8_e4m3fn)
    matrix = BlockQuantized(ones, q.scale, q.tile, q.fmt, q.width, q.pow2_scales, q.ends)
    return matrix.dequantize(torch.float32).double()
