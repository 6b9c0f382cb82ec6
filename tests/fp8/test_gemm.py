"""FP8 matrix products against a loop over blocks in NumPy, and the error of tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterflow.fp8.gemm import HOPPER, accumulate, dgrad, fprop, promoted, wgrad
from counterflow.fp8.quantize import BlockQuantized, fake_quantize, quantize
from counterflow.settings import UsageError
from counterflow.tests.fp8.tiling import code_values

ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)
T, K, N = 300, 520, 264
ENDS = (100, 100, 257, 300)
# product, shapes of its operands, their tiles, and each operand's contracted dimension
PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...], tuple[int, int]]] = {
    "fprop": (fprop, ((T, K), (N, K)), (ROW, SQUARE), (1, 1)),
    "dgrad": (dgrad, ((T, N), (N, K)), (ROW, SQUARE), (1, 0)),
    "dgrad of square blocks": (dgrad, ((T, N), (N, K)), (SQUARE, SQUARE), (1, 0)),
    "wgrad": (wgrad, ((T, N), (T, K)), (COLUMN, COLUMN), (0, 0)),
    "wgrad of a square and columns": (wgrad, ((T, N), (T, K)), (SQUARE, COLUMN), (0, 0)),
}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random BF16 numbers whose tiles have different scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (x * torch.randn(shape[-1], generator=generator).exp()).bfloat16()


def arrays(q: BlockQuantized, contracted: int) -> tuple[np.ndarray, np.ndarray]:
    """Unscaled FP64 values and an FP32 scale for every element, contraction last."""
    values = code_values(q.fmt)[q.data.view(torch.uint8).long()]
    scale = q.scale.repeat_interleave(q.tile[0], 0)[: q.shape[0]].repeat_interleave(q.tile[1], 1)[:, : q.shape[1]]
    return tuple((x if contracted else x.T).contiguous().numpy() for x in (values, scale))  # type: ignore[return-value]


def block_loop(a: BlockQuantized, b: BlockQuantized, contracted: tuple[int, int]) -> Tensor:
    """The definition with power-of-two scales: partial sums of 128, rounded, scaled and added in FP32."""
    (left, left_scale), (right, right_scale) = arrays(a, contracted[0]), arrays(b, contracted[1])
    result = np.zeros((left.shape[0], right.shape[0]), np.float32)
    for start in range(0, left.shape[1], 128):
        for i in range(left.shape[0]):
            products = left[i, start : start + 128] * right[:, start : start + 128]
            partial = products.sum(1).astype(np.float32)  # exact in FP64, then rounded once
            result[i] += partial * left_scale[i, start] * right_scale[:, start]
    return torch.from_numpy(result)


def bfloat16_ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in BF16 numbers."""
    bits = [x.view(torch.int16).int() for x in (a, b)]
    first, second = (torch.where(x < 0, -32768 - x, x) for x in bits)  # in the order of the numbers
    return (first - second).abs()


def operands(name: str, pow2: bool = True) -> tuple[BlockQuantized, BlockQuantized]:
    _, shapes, tiles, _ = PRODUCTS[name]
    a, b = (quantize(random(s, i), t, pow2_scales=pow2) for i, (s, t) in enumerate(zip(shapes, tiles, strict=True)))
    return a, b


@pytest.mark.parametrize("name", PRODUCTS)
def test_promoted_equals_a_loop_over_blocks_bit_for_bit(name: str) -> None:
    product, _, _, contracted = PRODUCTS[name]
    a, b = operands(name)
    expected = block_loop(a, b, contracted)
    assert torch.equal(product(a, b, mode="promoted", out_dtype=torch.float32), expected)
    assert torch.equal(product(a, b, mode="promoted"), expected.bfloat16())


@pytest.mark.parametrize("name", PRODUCTS)
def test_fp32_scales_only_add_fp32_rounding(name: str) -> None:
    product, _, _, contracted = PRODUCTS[name]
    a, b = operands(name, pow2=False)
    (left, left_scale), (right, right_scale) = arrays(a, contracted[0]), arrays(b, contracted[1])
    exact = (left * left_scale) @ (right * right_scale).T  # FP64
    size = np.abs(left * left_scale) @ np.abs(right * right_scale).T
    for mode in ("promoted", "fast"):
        error = np.abs(product(a, b, mode=mode, out_dtype=torch.float32).numpy() - exact)
        assert (error <= 1e-5 * size).all()
        # One accumulator per result, the least exact order on a CPU, rounds K growing partial sums. The relative error
        # of each is 2^-24 / sqrt(3), root mean square, and the j-th sum is sqrt(j / K) of the result. Rounding the
        # operands adds less than another 2^-24. A promoted product has one rounded sum per tile.
        rounding = 2.0**-24 * (np.sqrt(left.shape[1] / 6) + 1)
        assert np.linalg.norm(error) < (3e-7 if mode == "promoted" else rounding) * np.linalg.norm(exact)


def test_fast_is_within_one_bfloat16_ulp_of_promoted() -> None:
    x, w, dy = random((768, 1024), 0), random((640, 1024), 1), random((768, 640), 2)
    for kind, pow2 in (("power-of-two", True), ("FP32", False)):
        square, row_x, row_dy, column_x, column_dy = (
            quantize(t, tile, pow2_scales=pow2)
            for t, tile in ((w, SQUARE), (x, ROW), (dy, ROW), (x, COLUMN), (dy, COLUMN))
        )
        for product, a, b in ((fprop, row_x, square), (dgrad, row_dy, square), (wgrad, column_dy, column_x)):
            ulps = bfloat16_ulps(product(a, b), product(a, b, mode="promoted"))
            equal, near = (ulps == 0).double().mean().item(), (ulps <= 1).double().mean().item()
            print(
                f"{product.__name__}, {kind} scales: {equal:.5%} of {ulps.numel()} equal, "
                f"{near:.5%} within 1 ulp, {int(ulps.max())} at most"
            )
            assert near > 0.9999


def test_fast_takes_fake_quantised_values() -> None:
    x, w = random((T, K), 0), random((N, K), 1)
    from_codes = fprop(quantize(x), quantize(w, SQUARE))
    assert torch.equal(fprop(fake_quantize(x), fake_quantize(w, SQUARE)), from_codes)
    with pytest.raises(UsageError, match="mode fast"):
        fprop(fake_quantize(x), quantize(w, SQUARE), mode="promoted")


@pytest.mark.parametrize("mode", ["fast", "promoted"])
@pytest.mark.parametrize("pow2", [True, False])
def test_grouped_products_are_those_of_every_expert(mode: Any, pow2: bool) -> None:
    x, dy, w = random((T, K), 0), random((T, N), 1), random((len(ENDS), N, K), 2)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    stack = quantize(w, SQUARE, pow2_scales=pow2)
    row = {"pow2_scales": pow2}
    column = {"pow2_scales": pow2, "offsets": offsets}
    y = fprop(quantize(x, **row), stack, offsets=offsets, mode=mode)
    dx = dgrad(quantize(dy, **row), stack, offsets=offsets, mode=mode)
    dw = wgrad(quantize(dy, COLUMN, **column), quantize(x, COLUMN, **column), offsets=offsets, mode=mode)
    assert dw.shape == w.shape and not dw[1].any()  # the second expert has no rows
    for expert, (start, stop) in enumerate(pairwise((0, *ENDS))):
        rows = slice(start, stop)
        alone = quantize(w[expert], SQUARE, **row)
        part, grad = quantize(x[rows], **row), quantize(dy[rows], **row)
        assert bfloat16_ulps(y[rows], fprop(part, alone, mode=mode)).le(1).all()
        assert bfloat16_ulps(dx[rows], dgrad(grad, alone, mode=mode)).le(1).all()
        columns = (quantize(dy[rows], COLUMN, **row), quantize(x[rows], COLUMN, **row))
        assert bfloat16_ulps(dw[expert], wgrad(*columns, mode=mode)).le(1).all()


def test_operands_that_do_not_go_together_are_refused() -> None:
    x, w = random((T, K), 0), random((N, K), 1)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    for call, words in (
        (lambda: fprop(quantize(x, COLUMN), quantize(w, SQUARE)), r"\(128, 1\).*along columns.*\(1, 128\)"),
        (lambda: dgrad(quantize(x), quantize(w)), r"\(1, 128\).*along rows.*\(128, 1\)"),
        (lambda: fprop(quantize(x), quantize(w[:, :500].contiguous(), SQUARE)), "520 columns with 500"),
        (lambda: fprop(quantize(x), quantize(w[:, :500].contiguous(), SQUARE), mode="promoted"), "520 .* with 500"),
        (lambda: wgrad(quantize(x, COLUMN), quantize(x, COLUMN), offsets=offsets), "None.*quantise it with these"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


def truncate(value: Fraction, places: int, exponent: int) -> Fraction:
    unit = Fraction(2) ** (exponent - places)
    return int(value / unit) * unit


def floor_log2(value: Fraction) -> int:
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    return exponent if abs(value) >= Fraction(2) ** exponent else exponent - 1


def tensor_core(a: list[float], b: list[float]) -> Fraction:
    """One dot product by the rule of `Accumulator`, in fractions."""
    total = Fraction(0)
    for start in range(0, len(a), 32):
        pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True)]
        pairs = [(x, y) for x, y in pairs if x and y]
        exponents = [max(floor_log2(x), -6) + max(floor_log2(y), -6) for x, y in pairs]
        largest = max(exponents + ([floor_log2(total)] if total else []), default=0)
        total = sum((truncate(x * y, 13, largest) for x, y in pairs), truncate(total, 13, largest))
        total = truncate(total, 13, floor_log2(total)) if total else total
    return total


def unscaled(q: BlockQuantized) -> list[list[float]]:
    values: list[list[float]] = code_values(q.fmt)[q.data.view(torch.uint8).long()].tolist()
    return values


def test_the_tensor_core_model_equals_fractions() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, spread = (torch.randn(8, 300, generator=generator) for _ in range(2))
    wide = plain * (3 * spread).exp2()
    wide[:, ::7] = 0
    small = 2.0**-9 * torch.randint(-7, 8, (8, 300), generator=generator)  # subnormal numbers
    for x, y in ((plain, spread), (wide, wide), (small, wide), (small, small)):
        a, b = (quantize(part, eps=448.0) for part in (x, y))  # scales of at least 1 leave small numbers small
        assert accumulate(a, b, HOPPER).tolist() == [
            [float(tensor_core(u, v)) for v in unscaled(b)] for u in unscaled(a)
        ]


def test_promotion_removes_the_error_that_grows_with_k() -> None:
    """V3 §3.3.2: without promotion the error of a random product is nearly 2 % at K = 4096."""
    generator = torch.Generator().manual_seed(0)
    errors: dict[tuple[str, int], tuple[float, float]] = {}
    for name, draw in (("normal", torch.randn), ("uniform", torch.rand)):
        for k in (128, 1024, 4096):
            a, b = (quantize(draw(64, k, generator=generator)) for _ in range(2))
            exact = promoted(a, b, torch.float32)
            plain = a.data.float().double() @ b.data.float().double().T
            raw = (accumulate(a, b, HOPPER).double() - plain).abs().max() / plain.square().mean().sqrt()
            kept = (promoted(a, b, torch.float32, HOPPER) - exact).abs().max() / exact.square().mean().sqrt()
            errors[name, k] = raw.item(), kept.item()
            print(f"{name} K={k}: largest error / rms {raw:.3%} in the tensor core, {kept:.3%} promoted every 128")
    for name in ("normal", "uniform"):
        assert errors[name, 4096][0] > 4 * errors[name, 128][0]  # grows
        assert errors[name, 4096][1] < 2 * errors[name, 128][1]  # does not
    assert 0.005 < errors["normal", 4096][0] < 0.02 < errors["uniform", 4096][0] < 0.1
