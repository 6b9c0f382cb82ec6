"""The fused Triton kernels on a GPU, at DeepSeek-V3's widths, against the unfused operations on the CPU.

Codes and scales are compared byte for byte, so a flush of subnormal scales, an approximate division or a miscompiled
transposed store shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.comm.permute import order_by_expert
from counterflow.fp8 import triton as fused
from counterflow.fp8.quantize import BlockQuantized, quantize
from counterflow.tests.fp8.triton_claims import (
    assert_same,
    assert_within,
    exact_swiglu,
    exact_swiglu_backward,
    gates,
    numbers,
    plain_codes,
    swiglu_backward_by,
    swiglu_by,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0 or above",
)

ENDS = {"even": None, "groups of 16": (16, 16, 656, 1024), "any groups": (0, 37, 165, 1001, 1024)}
ROWS = 1024


def on(where: str, value: Any) -> Any:
    if isinstance(value, BlockQuantized):
        data = on(where, value.data.mT).mT if value.tile == (128, 1) else on(where, value.data)
        return BlockQuantized(
            data, on(where, value.scale), value.tile, value.fmt, value.width, value.pow2_scales, value.ends
        )
    return value.to(where) if isinstance(value, Tensor) else value


def run(name: str, *arguments: Any) -> Any:
    """Result of a kernel on the GPU, copied to the CPU, after two runs that must give the same bits."""
    made, again = (getattr(fused, name)(*(on("cuda", value) for value in arguments)) for _ in range(2))
    parts, others = ((value if isinstance(value, tuple) else (value,)) for value in (made, again))
    back = [on("cpu", value) for value in parts]
    for part, other in zip(back, (on("cpu", value) for value in others), strict=True):
        assert part is None or (
            torch.equal(part, other) if isinstance(part, Tensor) else torch.equal(plain_codes(part), plain_codes(other))
        )
    return tuple(back) if isinstance(made, tuple) else back[0]


def groups_of(name: str) -> tuple[tuple[int, ...] | None, fused.RowGroups | None]:
    ends = ENDS[name]
    return ends, None if ends is None else fused.group_rows(ends, "cuda")


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("groups", ENDS)
@pytest.mark.parametrize("width", [7168, 2048, 1000, 130, 1])
def test_both_tilings_are_quantizes(width: int, groups: str, pow2: bool) -> None:
    ends, on_device = groups_of(groups)
    x = numbers(ROWS, width, width)
    rows, columns = run("quantize_both", x, on_device, pow2)
    assert_same(rows, quantize(x, (1, 128), pow2_scales=pow2))
    assert_same(columns, quantize(x, (128, 1), pow2_scales=pow2, offsets=ends))


@pytest.mark.parametrize("pow2", [True, False])
def test_every_positive_bfloat16_as_a_tiles_largest(pow2: bool) -> None:
    largest = torch.arange(0, 0x7F81).to(torch.int16).view(torch.bfloat16)
    shares = torch.linspace(-1, 1, 127).mul(1 / 448).exp2().sub(0.999).mul(448)
    shares = torch.cat((torch.tensor([1.0]), shares.clamp(-1, 1)))
    x = (shares[:, None] * largest.float()).bfloat16()
    _, columns = run("quantize_both", x, None, pow2)
    assert_same(columns, quantize(x, (128, 1), pow2_scales=pow2))
    rows, _ = run("quantize_both", x.mT.contiguous(), None, pow2)
    assert_same(rows, quantize(x.mT.contiguous(), pow2_scales=pow2))


@pytest.mark.parametrize("groups", ENDS)
@pytest.mark.parametrize("kinds", [(True, True), (False, False), (False, True), (True, False)])
def test_requantised_codes_are_those_of_dequantised_values(groups: str, kinds: tuple[bool, bool]) -> None:
    ends, on_device = groups_of(groups)
    for width in (7168, 200):
        cached = quantize(numbers(ROWS, width, 3), pow2_scales=kinds[0])
        columns = run("requantize_columns", cached, on_device, kinds[1])
        assert_same(columns, cached.requantize((128, 1), pow2_scales=kinds[1], offsets=ends))


def share_that_differs(ours: BlockQuantized, theirs: BlockQuantized) -> float:
    return (plain_codes(ours) != plain_codes(theirs)).float().mean().item()


@pytest.mark.parametrize("groups", ENDS)
@pytest.mark.parametrize("cache", [None, True, False])
@pytest.mark.parametrize("inner", [2048, 1040])
def test_swiglu_is_within_its_bound_and_nearly_always_torchs(inner: int, cache: bool | None, groups: str) -> None:
    on_device = groups_of(groups)[1]
    gate_up, weights = gates(ROWS, inner, inner)
    grad, _ = gates(ROWS, inner // 2, 1)
    given = gate_up if cache is None else quantize(gate_up, pow2_scales=cache)
    values = gate_up if isinstance(given, Tensor) else given.dequantize(torch.bfloat16)
    for factor in (weights, None):
        made = quantize(run("swiglu", given, factor)), run("swiglu_quantize_columns", given, factor, on_device)
        hidden = swiglu_by(torch.exp, values, factor)
        if isinstance(given, Tensor):
            again, kept = run("swiglu_keeping", given, factor)
            assert torch.equal(again, run("swiglu", given, factor))
            assert_same(kept, quantize(gate_up))
        grads, grad_weights = run("swiglu_backward", grad, given, factor)
        gradient = swiglu_backward_by(torch.exp, grad, values, factor)
        for ours, exact, plain in (
            *((q, exact_swiglu(values, factor), hidden) for q in made),
            (quantize(grads), exact_swiglu_backward(grad, values, factor), gradient),
        ):
            assert_within(ours, *exact)
            theirs = quantize(plain, ours.tile, offsets=ours.ends)
            assert share_that_differs(ours, theirs) < 1e-3
        if factor is not None:
            terms = grad.double() * exact_swiglu(values, None)[0]
            assert bool(((grad_weights - terms.sum(1)).abs() <= 2e-6 * terms.abs().sum(1)).all())


def order_of(tokens: int) -> Any:
    ids = torch.rand(tokens, 256, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :8]
    return order_by_expert(ids, 256)


@pytest.mark.parametrize("width", [7168, 1000, 130])
@pytest.mark.parametrize("pow2", [True, False])
def test_messages_hold_each_tokens_codes_and_scales(width: int, pow2: bool) -> None:
    x, order = numbers(300, width, width), order_of(300)
    message = run("quantize_for_dispatch", x, order.row_of_slot, 2400, pow2)
    assert_same(fused.unpack_message(message, width, pow2), quantize(x[order.token_of_row], pow2_scales=pow2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fmt", "width"), [("e4m3", 7168), ("e4m3", 130), ("e5m6", 16384), ("e5m6", 256)])
@pytest.mark.parametrize("pow2", [True, False])
def test_rows_are_quantizes_and_are_restored(fmt: str, width: int, pow2: bool, dtype: torch.dtype) -> None:
    x = numbers(ROWS, width, width).to(dtype)
    ours, theirs = run("quantize_rows", x, fmt, pow2), quantize(x, fmt=fmt, pow2_scales=pow2)  # type: ignore[arg-type]
    assert torch.equal(ours.scale.view(torch.int32), theirs.scale.view(torch.int32))
    for wide in (torch.bfloat16, torch.float32):
        expected = theirs.dequantize(wide)
        for made in (ours.dequantize(wide), run("dequantize_rows", theirs, wide)):
            assert torch.equal(made.nan_to_num(), expected.nan_to_num()) and torch.equal(made.isnan(), expected.isnan())
