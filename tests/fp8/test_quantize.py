"""Block quantisation against integer arithmetic, tile by tile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import quantize as module
from counterflow.fp8 import tiles
from counterflow.fp8.quantize import BlockQuantized, FP8RangeError, fake_quantize, quantize, quantize_with_values
from counterflow.settings import UsageError
from counterflow.tests.fp8.tiling import code_values, oracle_quantize, same, tiles_of

TILES = ((1, 128), (128, 1), (128, 128))
DTYPES = (torch.bfloat16, torch.float32)
WAYS = list(itertools.product(TILES, (True, False), DTYPES))


def unscaled(q: BlockQuantized) -> Tensor:
    """FP64 values of the codes, looked up in a table made from the format's definition."""
    if q.fmt == "e5m6":
        ones = BlockQuantized(q.data, torch.ones_like(q.scale), q.tile, q.fmt, q.width, q.pow2_scales)
        return ones.dequantize(torch.float32).double()
    return code_values(q.fmt)[q.data.view(torch.uint8).long()]


def check(x: Tensor, tile: tuple[int, int], pow2: bool, fmt: Any = "e4m3") -> None:
    """Check that our result is the oracle's, to the bit, and that the two other functions give the same values."""
    q = quantize(x, tile, fmt, pow2)
    values, scale = oracle_quantize(x, tile, fmt, pow2)
    assert torch.equal(q.scale.view(torch.int32), scale.view(torch.int32))
    assert same(unscaled(q), values)
    expected = q.dequantize()
    assert torch.equal(fake_quantize(x, tile, fmt, pow2), expected)
    again, along = quantize_with_values(x, tile, fmt, pow2)
    assert torch.equal(again.data.view(torch.uint8), q.data.view(torch.uint8)) and torch.equal(along, expected)


def anything_finite(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A quarter each of normal numbers, normals of any magnitude by row, wide spreads inside a row, and raw bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    part = rows // 4
    x[part : 2 * part] *= torch.rand(part, 1, generator=generator).mul(276).sub(149).exp2()
    x[2 * part : 3 * part] *= torch.rand(part, columns, generator=generator).mul(60).sub(40).exp2()
    bits = torch.randint(-(2**31), 2**31, (rows - 3 * part, columns), generator=generator, dtype=torch.int64)
    x[3 * part :] = bits.to(torch.int32).view(torch.float32)
    x = x.to(dtype)
    x[torch.rand(rows, generator=generator) < 0.01] = 0
    return torch.where(x.isfinite(), x, 1.0)


@pytest.mark.parametrize(("tile", "pow2", "dtype"), WAYS)
def test_quantize_equals_integer_arithmetic_on_ten_million_numbers(
    tile: tuple[int, int], pow2: bool, dtype: torch.dtype
) -> None:
    for seed in range(4):
        for part in anything_finite(1024, 208, dtype, seed).chunk(4):  # 12 ways x 4 x 213 thousand
            check(part, tile, pow2)


@pytest.mark.parametrize(("fmt", "tile", "pow2"), list(itertools.product(("e5m2", "e5m6"), TILES, (True, False))))
def test_other_formats_equal_integer_arithmetic(fmt: str, tile: tuple[int, int], pow2: bool) -> None:
    for dtype in DTYPES:
        check(anything_finite(512, 201, dtype, 7), tile, pow2, fmt)


def every_finite_bfloat16() -> Tensor:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize(
    ("fmt", "dtype"), [("e4m3", torch.bfloat16), ("e4m3", torch.float32), ("e5m6", torch.bfloat16)]
)
def test_every_bfloat16_as_the_largest_of_its_tile(fmt: str, pow2: bool, dtype: torch.dtype) -> None:
    amax = every_finite_bfloat16().to(dtype)
    shares = torch.tensor([1.0, -1.0, 0.5, -0.0, 1 / 448, 2.0**-14.5, 2.0**-15, 0.06640625])
    x = (amax.float()[:, None] * shares).to(dtype)
    check(x, (1, 128), pow2, fmt)
    if fmt == "e4m3" and dtype == torch.bfloat16:
        check(x.T.contiguous(), (128, 1), pow2, fmt)


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("tile", TILES)
def test_every_bfloat16_as_an_element_below_fixed_maxima(tile: tuple[int, int], pow2: bool) -> None:
    values = every_finite_bfloat16()
    for amax in (2.0**-126, 2.0**-20, 0.4375, 1.0, 448.0, 449.0, 3.3895313892515355e38):
        chosen = values[values.abs() <= amax]
        chosen = torch.nn.functional.pad(chosen, (0, -chosen.numel() % 127)).view(-1, 127)
        with_maximum = torch.cat((chosen, torch.full((chosen.shape[0], 1), amax, dtype=torch.bfloat16)), 1)
        x = with_maximum.T.contiguous() if tile == (128, 1) else with_maximum
        check(x, tile, pow2)


@pytest.mark.parametrize("pow2", [True, False])
def test_maxima_one_ulp_around_every_power_of_two_and_the_formats_maximum(pow2: bool) -> None:
    powers = torch.arange(-149, 128).double().exp2()
    near = torch.cat((powers, powers[20:] * 1.75, torch.tensor([448.0 / 2**127, 448.0 * 2.0**-128]).double())).float()
    ulps = torch.tensor([-2, -1, 0, 1, 2])
    bits = (near.view(torch.int32)[:, None] + ulps).clamp(0, 0x7F7FFFFF).flatten().to(torch.int32)
    amax = bits.view(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = amax[:, None] * torch.rand(amax.numel(), 130, generator=generator)
    x[:, 3], x[:, 129] = amax, -amax
    check(x, (1, 128), pow2)
    check(x.T.contiguous(), (128, 1), pow2)


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (127, 129), (128, 128), (129, 127), (257, 300), (5, 0), (0, 7)])
@pytest.mark.parametrize("tile", TILES)
def test_partial_tiles_are_their_own_tiles(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantize(x, tile)
    assert q.shape == x.shape and q.scale.shape == (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    for i, j, rows, columns in tiles_of(shape, tile):
        alone = quantize(x[rows, columns].contiguous(), tile)
        assert alone.scale.item() == q.scale[i, j].item()
        assert torch.equal(alone.data.float(), q.data[rows, columns].float())


@pytest.mark.parametrize(("tile", "pow2", "dtype"), WAYS)
def test_infinities_and_nan_follow_the_gpu_rule(tile: tuple[int, int], pow2: bool, dtype: torch.dtype) -> None:
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(dtype) * 1000
    x[5, 7], x[5, 200], x[140, 7], x[140, 8], x[200, 300] = torch.inf, -torch.inf, torch.nan, 3e38, torch.nan
    q = quantize(x, tile, pow2_scales=pow2)
    for i, j, rows, columns in tiles_of((256, 384), tile):
        part, codes = x[rows, columns].float(), q.data[rows, columns].float()
        known = part.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        if known.isinf().any():  # scale 1, and values that exceed the format saturate
            assert q.scale[i, j] == 1
            assert torch.equal(codes, known.clamp(-448, 448).to(torch.float8_e4m3fn).float())
        else:  # NaN takes no part in the maximum, and stays
            finite = quantize(known.to(dtype).contiguous(), tile, pow2_scales=pow2)
            assert q.scale[i, j] == finite.scale.item()
            assert same(codes, torch.where(part.isnan(), torch.nan, finite.data.float()))
    assert same(fake_quantize(x, tile, pow2_scales=pow2).abs(), q.dequantize().abs())


def test_checked_names_what_is_not_finite() -> None:
    x = torch.zeros(300, 256).bfloat16()
    x[270, 130], x[271, 3], x[271, 4] = torch.inf, torch.nan, -torch.nan
    for tile in TILES:
        with pytest.raises(FP8RangeError, match=r"2 NaN and 1 infinities .* row 270, column 130|NaN and .* column"):
            quantize(x, tile, checked=True)
    quantize(torch.zeros(3, 3), checked=True)


def test_eps_is_the_least_maximum() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-6, 0.0], [1.0, 0.5]])
    q = quantize(x, pow2_scales=False, eps=1e-4)
    maxima = torch.tensor([[1e-4], [1e-4], [1.0]])
    assert torch.equal(q.scale, (torch.tensor(448.0) / maxima).reciprocal())
    assert torch.equal(fake_quantize(x, eps=1e-4), quantize(x, eps=1e-4).dequantize())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m6"])
def test_groups_and_stacks_share_no_tile(tile: tuple[int, int], fmt: Any) -> None:
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    ends = (0, 130, 130, 258, 500)
    grouped = quantize(x, tile, fmt, offsets=torch.tensor(ends, dtype=torch.int32))
    stacked = quantize(x.view(5, 100, 300), tile, fmt)
    for parts, bounds in ((grouped, (0, *ends)), (stacked, range(0, 501, 100))):
        whole = parts.dequantize().reshape(x.shape)
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            alone, part = quantize(x[start:stop], tile, fmt), parts.group(index)
            assert torch.equal(part.scale, alone.scale)
            assert torch.equal(part.data.view(torch.uint8), alone.data.view(torch.uint8))
            assert torch.equal(whole[start:stop], alone.dequantize())
    assert torch.equal(fake_quantize(x, tile, fmt, offsets=ends), grouped.dequantize())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e5m6"])
def test_power_of_two_values_are_exact_in_bfloat16_but_for_its_subnormals(tile: tuple[int, int], fmt: Any) -> None:
    q = quantize(anything_finite(512, 256, torch.bfloat16, 5), tile, fmt)
    exact = q.dequantize(torch.float32)
    representable = (exact.abs() >= 2.0**-126) | (exact == 0)
    assert torch.equal(q.dequantize().float()[representable], exact[representable])
    assert representable.float().mean() > 0.75  # a quarter of the rows can be as small as that


def test_results_do_not_depend_on_pieces_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = anything_finite(600, 333, torch.bfloat16, 9)
    for tile in TILES:
        whole = quantize(x, tile)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "PIECE_ELEMENTS", 1000)
            cut = quantize(x, tile)
            assert torch.equal(cut.dequantize(), whole.dequantize())
            assert torch.equal(fake_quantize(x, tile), whole.dequantize())
        assert torch.equal(cut.data.float(), whole.data.float()) and torch.equal(cut.scale, whole.scale)


def test_transposing_is_exact_and_turns_the_tiles() -> None:
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    for tile in TILES:
        turned = quantize(x, tile).transpose()
        direct = quantize(x.T, (tile[1], tile[0]))
        assert turned.tile == direct.tile and turned.shape == direct.shape
        assert torch.equal(turned.data.float(), direct.data.float()) and torch.equal(turned.scale, direct.scale)
        assert torch.equal(turned.dequantize(), direct.dequantize())


def test_requantising_loses_only_what_a_coarser_step_cannot_hold() -> None:
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[:, :128] *= torch.logspace(-3, 3, 256).unsqueeze(1)
    rows = quantize(x)
    columns = rows.requantize((128, 1))
    assert columns.tile == (128, 1) and columns.scale.shape == (2, 384)
    before, after = rows.dequantize(torch.float32), columns.dequantize(torch.float32)
    least = columns.scale.repeat_interleave(128, 0) * 2.0**-6  # the smallest normal numbers of the new tiles
    large = before.abs() >= least
    assert 0.5 < large.float().mean() < 1
    assert torch.equal(before[large], after[large])
    assert ((before - after).abs() <= least * 2.0**-4)[~large].all()


def test_what_cannot_be_quantised_is_refused_with_what_can() -> None:
    x = torch.zeros(4, 4)
    for call, words in (
        (lambda: quantize(x, (64, 64)), r"\(64, 64\).*\(128, 128\)"),
        (lambda: quantize(x, fmt="e3m4"), "e3m4.*e4m3"),  # type: ignore[arg-type]
        (lambda: quantize(x.double()), "float64.*BF16"),
        (lambda: quantize(x[0]), r"\(4,\)"),
        (lambda: quantize(x, offsets=[3, 2, 4]), r"\(3, 2, 4\)"),
        (lambda: quantize(x, offsets=[3, 5]), r"\(3, 5\)"),
        (lambda: quantize(x, fmt="e5m6").transpose(), "E5M6"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


def test_bytes_held_are_those_of_the_format() -> None:
    x = torch.randn(64, 512).bfloat16()
    scales = 64 * 4 * 4
    for fmt, bits in (("e4m3", 8), ("e5m2", 8), ("e5m6", 12)):
        q = quantize(x, fmt=fmt)  # type: ignore[arg-type]
        assert q.nbytes == q.data.untyped_storage().nbytes() + scales == 64 * 512 * bits // 8 + scales


@pytest.mark.parametrize("shape", [(0, 7), (0, 128, 256), (2, 0, 128), (2, 130, 200)])
def test_empty_matrices_and_stacks_keep_their_shapes(shape: tuple[int, ...]) -> None:
    for tile, fmt in itertools.product(TILES, ("e4m3", "e5m6")):
        q = quantize(torch.ones(shape), tile, fmt)  # type: ignore[arg-type]
        scales = (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))
        assert (
            q.shape == shape and q.scale.shape == scales and torch.equal(q.dequantize(), torch.ones(shape).bfloat16())
        )


def test_transposed_storage_of_groups_dequantises_alike() -> None:
    """Columns for W in the fused kernels' layout: the memory of the transposed matrix, tiles of groups of rows."""
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(5)).bfloat16()
    made = quantize(x, (128, 1), offsets=(90, 90, 300))
    turned = replace(made, data=made.data.mT.contiguous().mT)
    assert torch.equal(turned.dequantize(), made.dequantize())


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e5m6"])
@pytest.mark.parametrize(("tile", "pow2", "dtype"), WAYS)
def test_where_the_host_reads_no_values_the_bits_are_the_same(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], pow2: bool, dtype: torch.dtype, fmt: Any
) -> None:
    finite = anything_finite(400, 300, dtype, 8)
    with_others = finite.clone()
    with_others[:2, 130:132], with_others[300, 5] = torch.inf, torch.nan
    for x, expected in ((finite, 0), (with_others, 1)):
        met = torch.zeros(3, 1, dtype=torch.int32)

        def results(met: Tensor | None = None) -> tuple[BlockQuantized, Tensor, Tensor, Tensor]:
            codes = quantize(x, tile, fmt, pow2, met=None if met is None else met[0])  # noqa: B023
            fake = fake_quantize(x, tile, fmt, pow2, met=None if met is None else met[1])  # noqa: B023
            both = quantize_with_values(x, tile, fmt, pow2, met=None if met is None else met[2])  # noqa: B023
            return codes, fake, codes.dequantize(), both[1]

        on_cpu = results()
        with monkeypatch.context() as patch:
            patch.setattr(module, "reads_values", lambda device: False)
            elsewhere = results(met)
        assert torch.equal(on_cpu[0].data.view(torch.uint8), elsewhere[0].data.view(torch.uint8))
        assert torch.equal(on_cpu[0].scale.view(torch.int32), elsewhere[0].scale.view(torch.int32))
        for ours, theirs in zip(elsewhere[1:], on_cpu[1:], strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)) and same(ours.abs(), theirs.abs())
        assert met.tolist() == [[expected]] * 3


@pytest.mark.parametrize("tile", TILES)
def test_off_the_cpu_nothing_waits_for_values(tile: tuple[int, int]) -> None:
    x = torch.empty(300, 200, dtype=torch.bfloat16, device="meta")  # there are no values to read
    codes = quantize(x, tile, checked=True, offsets=(100, 300), met=x.new_empty(1, dtype=torch.int32))
    assert codes.dequantize().shape == fake_quantize(x, tile, checked=True).shape == x.shape
