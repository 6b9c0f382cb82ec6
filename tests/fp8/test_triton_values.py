"""The fused Triton kernels under Triton's interpreter, against `fp8/quantize.py` and plain torch."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterflow.comm.permute import order_by_expert
from counterflow.comm.wire import FP8Wire
from counterflow.fp8.quantize import BlockQuantized, quantize
from counterflow.fp8.tensor_formats import FormatName
from counterflow.fp8.triton import group_rows, message_bytes, unpack_message
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.fp8.tiling import same
from counterflow.tests.fp8.triton_claims import (
    assert_same,
    assert_within,
    exact_swiglu,
    exact_swiglu_backward,
    gates,
    numbers,
    swiglu_backward_by,
    swiglu_by,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROWS = 176
GROUPS = {"even": None, "groups of 16": (16, 16, 176), "any groups": (0, 37, 169, 172, 176)}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Function that runs a public function by its name, in a process where Triton interprets kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_interpreter) as pool:
        yield lambda name, *arguments, **named: pool.submit(
            triton_worker.interpreted, name, *arguments, **named
        ).result(timeout=100)


def exp(x: Tensor) -> Tensor:
    """NumPy's exp, which the interpreter uses."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.exp(x.numpy()))


# The corrected interpreter


def test_the_interpreters_corrected_conversions_are_torchs() -> None:
    every_bf16 = torch.arange(-(2**15), 2**15).to(torch.int32) << 16
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (400_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    near = (torch.randn(400_000, generator=generator) * 100).view(torch.int32)
    ties = near & ~0xFFFF | 0x8000, near & ~0xFFFFF | 0x80000, (near & ~0xFFFFF | 0x80000) - (12 << 23)
    bits = torch.cat((every_bf16, anything, near, near - (14 << 23), *ties))
    fp32, unsigned = bits.view(torch.float32), bits.numpy().view(np.uint32)
    bf16 = torch.from_numpy(triton_worker.bf16_of(unsigned).astype(np.uint16)).view(torch.bfloat16)
    assert same(bf16.float(), fp32.bfloat16().float())
    e4m3 = torch.from_numpy(triton_worker.e4m3_of(unsigned).astype(np.uint8)).view(torch.float8_e4m3fn)
    # Before 2.12 torch makes NaN of what is too large; later ones, and GPUs, take the largest value.
    assert same(e4m3.float(), fp32.clamp(-448, 448).to(torch.float8_e4m3fn).float())


# Quantising


@needs_triton
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_both_tilings_are_quantizes(run: Callable[..., Any], groups: str, pow2: bool) -> None:
    ends = GROUPS[groups]
    for width in (130, 256) if ends else (1, 300):
        x = numbers(ROWS, width, width)
        rows, columns = run("quantize_both", x, None if ends is None else group_rows(ends, "cpu"), pow2)
        assert_same(rows, quantize(x, (1, 128), pow2_scales=pow2))
        assert_same(columns, quantize(x, (128, 1), pow2_scales=pow2, offsets=ends))
        assert columns.data.mT.is_contiguous()


@needs_triton
@pytest.mark.parametrize("pow2", [True, False])
def test_every_positive_bfloat16_as_a_tiles_largest(run: Callable[..., Any], pow2: bool) -> None:
    largest = torch.arange(0, 0x7F81).to(torch.int16).view(torch.bfloat16)
    shares = torch.tensor([1.0, -0.53, 1 / 448, -0.0, 2.0**-15])
    x = (shares[:, None] * largest.float()).bfloat16()
    _, columns = run("quantize_both", x, None, pow2, in_one_block=True)
    assert_same(columns, quantize(x, (128, 1), pow2_scales=pow2))


@needs_triton
@pytest.mark.parametrize("kinds", [(True, True), (False, False), (False, True), (True, False)])
def test_requantised_codes_are_those_of_dequantised_values(run: Callable[..., Any], kinds: tuple[bool, bool]) -> None:
    ends = GROUPS["any groups"]
    cached = quantize(numbers(ROWS, 200, 3), pow2_scales=kinds[0])
    columns = run("requantize_columns", cached, group_rows(ends or (), "cpu"), kinds[1])
    assert_same(columns, cached.requantize((128, 1), pow2_scales=kinds[1], offsets=ends))


# SwiGLU


def as_given(gate_up: Tensor, cache: str) -> tuple[Tensor | BlockQuantized, Tensor]:
    """Input of the kernel, and the dequantised values of this input."""
    if cache == "BF16":
        return gate_up, gate_up
    cached = quantize(gate_up, pow2_scales=cache == "powers of two")
    return cached, cached.dequantize(torch.bfloat16)


@needs_triton
@pytest.mark.parametrize(("inner", "cache"), [(128, "BF16"), (128, "powers of two"), (72, "BF16"), (72, "FP32 scales")])
def test_swiglu_is_its_operations_then_quantize(run: Callable[..., Any], inner: int, cache: str) -> None:
    gate_up, weights = gates(ROWS, inner, inner)
    gate_up[11, ::5], gate_up[12, 3] = torch.inf, torch.nan
    given, values = as_given(gate_up, cache)
    for factor, pow2 in ((weights, True), (None, False)):
        hidden = swiglu_by(exp, values, factor)
        assert same(run("swiglu", given, factor).abs(), hidden.abs())
        if cache == "BF16":
            again, kept = run("swiglu_keeping", given, factor, pow2)
            assert same(again.abs(), hidden.abs())
            assert_same(kept, quantize(gate_up, pow2_scales=pow2))
        ends = GROUPS["groups of 16"]
        columns = run("swiglu_quantize_columns", given, factor, group_rows(ends or (), "cpu"), pow2)
        assert_same(columns, quantize(hidden, (128, 1), pow2_scales=pow2, offsets=ends))


@needs_triton
@pytest.mark.parametrize(("inner", "cache"), [(128, "BF16"), (128, "powers of two"), (72, "BF16"), (72, "FP32 scales")])
def test_swiglus_backward_is_its_operations(run: Callable[..., Any], inner: int, cache: str) -> None:
    gate_up, weights = gates(ROWS, inner, inner + 1)
    grad, _ = gates(ROWS, inner // 2, inner + 2)
    given, values = as_given(gate_up, cache)
    for factor in (weights, None):
        made, grad_weights = run("swiglu_backward", grad, given, factor)
        assert torch.equal(made, swiglu_backward_by(exp, grad, values, factor))
        if factor is None:
            assert grad_weights is None
        else:
            terms = grad.double() * exact_swiglu(values, None)[0]
            assert bool(((grad_weights - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all())


@needs_triton
def test_swiglu_is_within_its_bound_of_exact_values(run: Callable[..., Any]) -> None:
    gate_up, weights = gates(ROWS, 256, 0)
    grad, _ = gates(ROWS, 128, 1)
    assert_within(quantize(run("swiglu", gate_up, weights)), *exact_swiglu(gate_up, weights))
    gradient, _ = run("swiglu_backward", grad, gate_up, weights)
    assert_within(quantize(gradient), *exact_swiglu_backward(grad, gate_up, weights))


def test_torchs_own_swiglu_is_within_the_bound_and_a_worse_one_is_not() -> None:
    gate_up, weights = gates(ROWS, 256, 0)
    grad, _ = gates(ROWS, 128, 1)
    exact, exact_gradient = exact_swiglu(gate_up, weights), exact_swiglu_backward(grad, gate_up, weights)
    assert_within(quantize(swiglu_by(torch.exp, gate_up, weights)), *exact)
    assert_within(quantize(swiglu_backward_by(torch.exp, grad, gate_up, weights)), *exact_gradient)
    for power in (12, 9):  # a relative error of 2^-12 moves one value in a few hundred over a tie

        def off(x: Tensor, error: float = 2.0**-power) -> Tensor:
            return torch.exp(x) * (1 + error)

        with pytest.raises(AssertionError, match="not within the margin"):
            assert_within(quantize(swiglu_by(off, gate_up, weights)), *exact)
        with pytest.raises(AssertionError, match="not within the margin"):
            assert_within(quantize(swiglu_backward_by(off, grad, gate_up, weights)), *exact_gradient)


# Permuting


@needs_triton
@pytest.mark.parametrize(("width", "pow2"), [(128, True), (200, False), (1100, True)])
def test_a_message_holds_each_tokens_codes_and_scales(run: Callable[..., Any], width: int, pow2: bool) -> None:
    x = numbers(24, width, width)
    order = order_by_expert(torch.rand(24, 6, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3], 6)
    message = run("quantize_for_dispatch", x, order.row_of_slot, 72, pow2)
    assert message.shape == (72, message_bytes(width)) and message.shape[1] % 16 == 0
    assert_same(unpack_message(message, width, pow2), quantize(x[order.token_of_row], pow2_scales=pow2))
    start = -(-width // 16) * 16
    used = start + 4 * -(-width // 128)
    assert not message[:, width:start].any() and not message[:, used:].any()


@needs_triton
@pytest.mark.parametrize("width", [200, 512])
def test_the_wire_packs_the_same_messages_on_a_gpu(run: Callable[..., Any], width: int) -> None:
    """The kernel that the wire calls, against the wire on a CPU."""
    x = numbers(24, width, width, special=False)
    assert torch.equal(run("quantize_for_dispatch", x), FP8Wire().encode(x, "forward"))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize(("fmt", "width"), [("e4m3", 200), ("e4m3", 512), ("e5m6", 256), ("e5m6", 512)])
def test_rows_are_quantizes_and_are_restored(
    run: Callable[..., Any], fmt: FormatName, width: int, pow2: bool, dtype: torch.dtype
) -> None:
    x = numbers(40, width, width).to(dtype)
    ours, theirs = run("quantize_rows", x, fmt, pow2), quantize(x, fmt=fmt, pow2_scales=pow2)
    assert torch.equal(ours.scale.view(torch.int32), theirs.scale.view(torch.int32))
    for wide in (torch.bfloat16, torch.float32):
        expected = theirs.dequantize(wide)
        assert same(ours.dequantize(wide), expected)
        assert same(run("dequantize_rows", theirs, wide), expected)


@needs_triton
def test_messages_and_odd_rows_are_restored(run: Callable[..., Any]) -> None:
    x = numbers(24, 384, 5, special=False)
    packed = quantize(numbers(24, 301, 6, special=False), fmt="e5m6")  # a middle inside a tile
    for codes in (unpack_message(FP8Wire().encode(x, "forward"), 384), packed):
        assert torch.equal(run("dequantize_rows", codes, torch.bfloat16), codes.dequantize())


@needs_triton
@pytest.mark.parametrize("name", ["quantize_rows", "quantize_for_dispatch", "swiglu_keeping"])
def test_infinities_and_nan_set_the_flag_and_nothing_else_does(run: Callable[..., Any], name: str) -> None:
    for value, met in ((3e38, 0), (torch.inf, 1), (-torch.inf, 1), (torch.nan, 1)):
        x = torch.ones(20, 256).bfloat16()
        x[17, 200] = value
        for more in ((), ("e5m6",)) if name == "quantize_rows" else ((),):
            assert run("flag_of", name, x, *more) == met


@needs_triton
def test_slots_without_a_row_send_nothing(run: Callable[..., Any]) -> None:
    x = numbers(5, 128, 1, special=False)
    row_of_slot = torch.tensor([[1, -1], [-1, -1], [0, 3], [2, -1], [-1, 4]], dtype=torch.int32)
    message = run("quantize_for_dispatch", x, row_of_slot, 5)
    assert_same(unpack_message(message, 128), quantize(x[[2, 0, 3, 2, 4]]))
