"""Quantisation as torch operations: values on a CPU, shapes on the meta device, and infinities told by a flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import operations
from counterflow.fp8.message import unpack_message
from counterflow.fp8.quantize import BlockQuantized, quantize
from counterflow.fp8.tensor_formats import FormatName
from counterflow.kernels.swiglu import swiglu_backward_formula, swiglu_formula

R, INNER = 40, 320


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    found = []
    for part in parts:
        found += [part.data.view(torch.uint8), part.scale] if isinstance(part, BlockQuantized) else [part]
    return [part for part in found if part is not None]


def on_meta(value: Any) -> Any:
    if isinstance(value, BlockQuantized):
        return value.without_tensors()(on_meta(value.data), on_meta(value.scale))
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


CACHE = quantize(numbers(R, 2 * INNER))
WEIGHTS = torch.rand(R)
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "rows": (operations.quantize_rows, (numbers(R, 300),)),
    "rows in E5M6": (operations.quantize_rows, (numbers(R, 256), "e5m6", False)),
    "messages": (operations.quantize_messages, (numbers(R, 200),)),
    "keeping": (operations.swiglu_keeping, (numbers(R, 2 * INNER), WEIGHTS, True, None)),
    "SwiGLU": (operations.swiglu_of, (CACHE, None)),
    "SwiGLU backward": (operations.swiglu_backward_of, (numbers(R, INNER), CACHE, WEIGHTS)),
    "SwiGLU backward without weights": (operations.swiglu_backward_of, (numbers(R, INNER), CACHE, None)),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_values_are_those_of_the_values(name: str) -> None:
    function, arguments = CALLS[name]
    real, bare = tensors(function(*arguments)), tensors(function(*map(on_meta, arguments)))
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in bare]
    assert all(t.is_meta for t in bare)


def test_values_are_those_of_the_operations_that_each_fuses() -> None:
    hidden, cache = operations.swiglu_keeping(numbers(R, 2 * INNER), WEIGHTS, True, None)
    assert torch.equal(hidden, swiglu_formula(numbers(R, 2 * INNER), WEIGHTS))
    assert torch.equal(cache.data.view(torch.uint8), CACHE.data.view(torch.uint8))
    values, grad = CACHE.dequantize(), numbers(R, INNER)
    assert torch.equal(operations.swiglu_of(CACHE, WEIGHTS), swiglu_formula(values, WEIGHTS))
    for ours, theirs in zip(
        operations.swiglu_backward_of(grad, CACHE, WEIGHTS), swiglu_backward_formula(grad, values, WEIGHTS), strict=True
    ):
        assert theirs is not None and torch.equal(ours, theirs)
    codes = unpack_message(operations.quantize_messages(numbers(R, 200)), 200)
    assert torch.equal(codes.dequantize(), quantize(numbers(R, 200)).dequantize())


@pytest.mark.parametrize(("fmt", "width"), [("e4m3", 200), ("e5m6", 200), ("e5m6", 256), ("e5m2", 256)])
def test_a_matrix_is_restored_by_one_kernel_where_there_is_one(fmt: FormatName, width: int) -> None:
    matrix = quantize(numbers(R, width), fmt=fmt)
    assert torch.equal(operations.restore(matrix), matrix.dequantize())
    assert operations.restore(on_meta(matrix)).shape == matrix.shape
    has = operations.has_kernel(torch.device("meta"), fmt, width)
    assert has == ((fmt, width) in (("e4m3", 200), ("e5m6", 256)))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nan_set_the_flag(value: float) -> None:
    for wrong in (False, True):
        x, met = numbers(R, 512), torch.zeros(3, 1, dtype=torch.int32)
        if wrong:
            x[R - 1, 300] = value
        operations.quantize_rows(x, met=met[0])
        operations.quantize_messages(x, met[1])
        operations.swiglu_keeping(x, None, True, met[2])
        assert met.tolist() == [[int(wrong)]] * 3


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((9, 0), True), ((10, 0), True)])
def test_gpus_without_e4m3_take_the_general_way(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(operations, "find_spec", lambda name: object())
    assert operations.has_kernel(torch.device("cuda", 10 * capability[0])) is expected
