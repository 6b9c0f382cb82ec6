"""The formats against tables of all their codes, made from sign, exponent and mantissa."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.fp8.number_formats import (
    FORMATS,
    decode,
    decode_ue8m0,
    encode,
    encode_ue8m0,
    find_format,
    pack_e5m6,
    round_to,
    unpack_e5m6,
)
from counterflow.settings import UsageError
from counterflow.tests.fp8.tiling import code_values, same

NAMES: tuple[Any, ...] = ("e4m3", "e5m2", "e5m6")


def codes_as_data(name: str) -> torch.Tensor:
    """Every code of the format as encoded data of one row."""
    if name != "e5m6":
        return torch.arange(256).to(torch.uint8).view(1, 256).view(FORMATS[name].dtype)
    codes = torch.arange(4096)
    low = (codes & 0xF)[:2048] | (codes & 0xF)[2048:] << 4
    return torch.cat((codes >> 4, low)).to(torch.uint8).view(1, -1)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes_to_its_definition_and_back(name: str) -> None:
    fmt, data, table = FORMATS[name], codes_as_data(name), code_values(name)
    values = decode(data, fmt, table.numel())
    assert same(values.flatten().double(), table)
    finite = table.isfinite()
    assert table[finite].max() == fmt.max and table[table > 0].min() == 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    again = decode(encode(values, fmt), fmt, table.numel()).flatten()
    assert same(again[finite].double(), table[finite])
    assert again.isnan().equal(table.isnan())
    assert (again[table.isinf()].abs() == fmt.max).all()
    without_nan = data[:, :127] if name == "e4m3" else data  # the two ways of reading E4M3
    assert same(decode(without_nan, fmt, 127 if name == "e4m3" else 4096)[0, :127].double(), table[:127])


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_to_the_nearest_value_with_ties_to_the_even_code(name: str) -> None:
    fmt, table = FORMATS[name], code_values(name)
    positive = table[(table >= 0) & table.isfinite() & ~table.signbit()]  # codes 0, 1, 2… in order
    middles = (positive[1:] + positive[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    x = torch.cat((positive, middles, middles * (1 + 2**-22), middles * (1 - 2**-22), positive * 1.0001)).float()
    x = torch.cat((x, torch.randn(20000, generator=generator).mul(30).exp2().clamp(max=1e30)))
    x = torch.cat((x, -x, torch.tensor([1e38, -1e38, torch.inf, -torch.inf])))
    magnitude = x.double().abs().clamp(max=fmt.max)
    above = torch.searchsorted(positive, magnitude).clamp(max=positive.numel() - 1)
    below = (above - 1).clamp(min=0)
    nearer_above = positive[above] - magnitude < magnitude - positive[below]
    tie = positive[above] - magnitude == magnitude - positive[below]
    code = torch.where(nearer_above | (tie & (above % 2 == 0)), above, below)
    expected = positive[code].copysign(x.double())
    assert same(round_to(x, fmt).double(), expected)
    assert same(decode(encode(x, fmt), fmt, x.numel()).double(), expected)


def test_e5m6_packs_two_values_in_three_bytes() -> None:
    values = code_values("e5m6")[:4090].half()
    for width in (1, 2, 5, 10, 409, 818):
        rows = values.view(-1, width) if 4090 % width == 0 else values[: 4090 // width * width].view(-1, width)
        packed = pack_e5m6(rows)
        assert packed.dtype == torch.uint8 and packed.shape == (rows.shape[0], width + (width + 1) // 2)
        assert torch.equal(unpack_e5m6(packed, width).view(torch.int16), rows.view(torch.int16))
    assert pack_e5m6(torch.tensor([[1.0, -2.0, 1.015625]]).half()).tolist() == [[0x3C, 0xC0, 0x3C, 0x10, 0x00]]


def test_ue8m0_holds_every_power_of_two_of_fp32_from_its_subnormal_one() -> None:
    exponents = torch.arange(-127, 128)
    scale = exponents.double().exp2().float()
    codes = encode_ue8m0(scale)
    assert codes.dtype == torch.uint8 and torch.equal(codes.long(), exponents + 127)
    assert torch.equal(decode_ue8m0(codes), scale)
    assert decode_ue8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    for other in (0.0, 3.0, -2.0, torch.inf, torch.nan, 2.0**-128):
        with pytest.raises(UsageError, match="1 of 2 scales are not powers of two"):
            encode_ue8m0(torch.tensor([1.0, other]))


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="e4m3, e5m2, e5m6"):
        find_format("fp4")
