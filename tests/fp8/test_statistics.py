"""Statistics of a tensor's quantisation against NumPy's own count, and a case where V3's tiles matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterflow.fp8.linear import Linear
from counterflow.fp8.recipe import Monitor, Quantizer, Recipe
from counterflow.fp8.statistics import Statistics, Sums, measure
from counterflow.fp8.tensor_formats import TensorFormat, v3_formats

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e5m6": 65024.0}
FORMATS = [
    TensorFormat(),
    TensorFormat(pow2=False),
    TensorFormat(square=True),
    TensorFormat("e5m2", square=True, pow2=False),
    TensorFormat("e5m6"),
]


def spread(rows: int, columns: int) -> Tensor:
    """BF16 values over many binades, with zeros, a row of zeros alone, and rows far below the others."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(3 * torch.randn(rows, columns, generator=generator))
    x[::3] *= torch.exp2(-torch.arange(0, 3 * len(x[::3]), 3.0)).unsqueeze(1).clamp_min(2.0**-30)
    x[:, 5] = 0
    x[4] = 0
    x[20, 7] = 448 * 2.0**12  # the largest code in any tile
    return x.bfloat16()


def tiles_of(
    shape: tuple[int, int], format: TensorFormat, contracted: int, ends: list[int]
) -> list[tuple[slice, slice]]:
    down, across = (128, 128) if format.square else ((1, 128) if contracted else (128, 1))
    found = []
    for first, last in zip([0, *ends], ends, strict=False):
        for top in range(first, last, down):
            for left in range(0, shape[1], across):
                found.append((slice(top, min(top + down, last)), slice(left, min(left + across, shape[1]))))
    return found


def count(x: NDArray, q: NDArray, format: TensorFormat, tiles: list[tuple[slice, slice]]) -> dict[str, float]:
    """The statistics, computed from their definitions."""
    saturated = 0
    for place in tiles:
        amax = np.abs(x[place]).max()
        if amax == 0:
            continue
        multiplier = np.float32(LARGEST[format.fmt]) / np.float32(amax)
        if format.pow2:
            multiplier = 2.0 ** (np.frexp(multiplier)[1] - 1)
        codes = np.abs(q[place]).astype(np.float64) * np.float64(multiplier)
        saturated += int(np.isclose(codes, LARGEST[format.fmt], rtol=1e-6, atol=0).sum())
    nonzero = x != 0
    return {
        "error": float(np.linalg.norm(q - x) / np.linalg.norm(x)),
        "underflow": float((nonzero & (q == 0)).sum() / nonzero.sum()),
        "saturation": saturated / x.size,
        "binades": float(np.log2(np.abs(x[nonzero]).max() / np.abs(x[nonzero]).min())),
    }


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("ends", [[300], [7, 7, 150, 300]], ids=["one", "groups"])
def test_statistics_are_what_numpy_counts(format: TensorFormat, contracted: int, ends: list[int]) -> None:
    x, seen = spread(300, 200), Statistics()
    offsets = torch.tensor(ends, dtype=torch.int32) if len(ends) > 1 else None
    values = Quantizer("mtp.input", format, Monitor(observer=seen)).values(x, contracted, offsets)
    sums = (seen.first if contracted else seen.for_weights)["mtp.input"]
    exact, rounded = x.double().numpy(), values.double().numpy()
    # Tiles of one row are the same with any groups.
    expected = count(exact, rounded, format, tiles_of((300, 200), format, contracted, ends))
    assert {name: getattr(sums, name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert expected["saturation"] > 0 and sums.values == x.numel()

    rows = [(e, r) for e, r in zip(*(np.moveaxis(a, contracted, -1) for a in (exact, rounded)), strict=True) if e.any()]
    errors = np.array([np.linalg.norm(r - e) / np.linalg.norm(e) for e, r in rows])
    assert sums.rows == len(errors)
    assert sums.row_error == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-9)
    assert sums.worst_row == pytest.approx(errors.max(), rel=1e-9)


def test_a_stack_is_counted_as_its_matrices() -> None:
    stack, format = torch.stack([spread(130, 140), 2 * spread(130, 140)]), TensorFormat(square=True)
    seen = Statistics()
    values = Quantizer("experts_up.weight", format, Monitor(observer=seen)).values(stack, 1)
    together = Sums()
    for matrix, quantized in zip(stack, values, strict=True):
        together.add(measure(matrix, quantized, format, 1))
    assert seen.first["experts_up.weight"].to_json() == pytest.approx(together.to_json())


def test_nothing_is_seen_of_zeros() -> None:
    zeros = torch.zeros(3, 5)
    sums = measure(zeros, zeros, TensorFormat(), 1)
    assert sums.to_json() == {name: 15 if name == "values" else 0 for name in sums.to_json()}


def test_every_role_of_a_layer_is_seen_where_it_is_quantised() -> None:
    seen = Statistics()
    recipe = Recipe(v3_formats(), monitor=Monitor(observer=seen))
    layer = Linear(128, 128, recipe.linear("attention"))
    torch.nn.init.normal_(layer.weight)
    layer(torch.randn(64, 128, requires_grad=True)).square().sum().backward()
    assert sorted(seen.first) == ["attention.gradient", "attention.input", "attention.weight"]
    assert sorted(seen.for_weights) == ["attention.gradient", "attention.input"]
    assert seen.for_weights["attention.input"].error == 0  # it was quantised before
    for name, sums in seen.first.items():
        assert 0.02 < sums.error < 0.03, name  # E4M3 rounds to 2^-4 of a binade's start: 2.6 % of random values


@pytest.mark.parametrize("square", [False, True], ids=["1x128", "128x128"])
def test_tokens_beside_an_outlier_are_lost_in_square_tiles(square: bool) -> None:
    """V3's negative result (appendix B.2): outliers of activation gradients come by token. Here one token of 64 has a
    gradient 2^16 times as large as the others'. In tiles of 128 x 128 this token costs the others their
    precision."""
    generator, seen = torch.Generator().manual_seed(3), Statistics()
    formats = {"mtp.gradient": TensorFormat(square=square)}
    layer = Linear(256, 128, Recipe(formats, monitor=Monitor(observer=seen)).linear("mtp"))
    torch.nn.init.normal_(layer.weight, generator=generator)
    x = torch.randn(512, 256, generator=generator, requires_grad=True)
    dy = torch.randn(512, 128, generator=generator)
    dy[::64] *= 2.0**16
    layer(x).backward(dy)
    assert x.grad is not None
    exact = dy @ layer.weight.detach()
    others = torch.arange(512) % 64 != 0
    error = float((x.grad - exact)[others].norm() / exact[others].norm())
    sums = seen.first["mtp.gradient"]
    if square:
        assert error > 0.2 and sums.row_error > 0.2 and sums.underflow > 0.05
    else:
        assert error < 0.03 and sums.row_error < 0.03 and sums.underflow < 1e-3
