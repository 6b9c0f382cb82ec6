"""Tensors that a deferred W of an emulated layer holds, and the branch of its backward that a GPU takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from counterflow.fp8 import emulated, operations, products, quantize, recipe
from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.quantize import BlockQuantized
from counterflow.model.cached_swiglu import cached_swiglu
from counterflow.weight_gradients import WeightQueue, drain

T, K, N = 256, 384, 256
COUNTS = (100, 0, 156)


def layer(grouped: bool, kind: Any = None, **settings: Any) -> Any:
    made = PrecisionConfig(recipe="fp8", **settings).make().linear(kind or ("experts_up" if grouped else "attention"))
    result: Any = GroupedLinear(len(COUNTS), K, N, made) if grouped else Linear(K, N, made)
    generator = torch.Generator().manual_seed(0)
    result.weight.data = torch.randn(result.weight.shape, generator=generator).bfloat16()
    result.weight_queue = WeightQueue()
    return result


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp2()).bfloat16()


def run(linear: Any, defer: bool, *more: Any, **named: Any) -> tuple[list[Tensor], list[Tensor]]:
    """y, dx and dw; and the tensors that the deferred W holds."""
    x, dy = numbers(T, K, seed=1).requires_grad_(), numbers(T, N, seed=2)
    later: deque[Callable[[], None]] = deque()
    linear.weight.grad = None
    offsets = torch.tensor(COUNTS).cumsum(0).int()
    y = linear(x, *((offsets,) if isinstance(linear, GroupedLinear) else ()), *more, **named)
    with linear.weight_queue.into(later if defer else None):
        y.backward(dy)
    held = [tensor for work in later for tensor in tensors_of(work, set())]
    drain(later)
    assert x.grad is not None
    return [y.detach(), x.grad, linear.weight.grad], held


def tensors_of(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that a function, its arguments and its closure hold."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, BlockQuantized):
        yield from (thing.data, thing.scale)
    elif isinstance(thing, partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from tensors_of(part, seen)
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from tensors_of(part, seen)
    elif callable(thing) and getattr(thing, "__closure__", None):
        for cell in thing.__closure__:
            yield from tensors_of(cell.cell_contents, seen)


@pytest.mark.parametrize("settings", [{}, {"scales": "v3"}, {"products": "promoted"}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_deferred_w_holds_codes_of_both_operands_and_gives_the_same_bits(
    grouped: bool, settings: dict[str, Any]
) -> None:
    linear = layer(grouped, **settings)
    (at_once, _), (deferred, held) = run(linear, False), run(linear, True)
    for ours, theirs in zip(deferred, at_once, strict=True):
        assert torch.equal(ours, theirs)
    operands = [tensor for tensor in held if tensor is not linear.weight and tensor.dtype != torch.int32]
    codes = [tensor for tensor in operands if tensor.dtype == torch.float8_e4m3fn]
    scales = [tensor for tensor in operands if tensor.dtype == torch.float32]
    assert len(codes) == len(scales) == 2 and len(operands) == 4  # no value, no activation
    assert sum(tensor.nbytes for tensor in codes) == T * (K + N)
    assert sum(tensor.nbytes for tensor in scales) == 4 * (K + N) * (3 if grouped else 2)


def test_a_deferred_w_without_a_format_for_its_input_holds_the_input() -> None:
    linear = layer(False, classes={"attention.input": ClassConfig(format="high")})
    (at_once, _), (deferred, held) = run(linear, False), run(linear, True)
    assert all(map(torch.equal, deferred, at_once))
    assert T * K * 2 in [tensor.nbytes for tensor in held if tensor is not linear.weight]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Function that makes CPU tensors take the GPU's branch, with the formulas of the fused kernels."""

    def switch() -> None:
        plain = operations.has_kernel

        def has_kernel(device: torch.device, *more: Any) -> bool:
            return plain(torch.device("meta"), *more)

        for module in (operations, recipe, emulated):
            monkeypatch.setattr(module, "has_kernel", has_kernel)
        for module in (quantize, recipe):
            monkeypatch.setattr(module, "reads_values", lambda device: False)

    return switch


@pytest.mark.parametrize("settings", [{}, {"scales": "v3"}, {"products": "promoted"}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("defer", [False, True])
def test_the_branch_of_a_gpu_gives_the_bits_of_a_cpu(
    as_on_a_gpu: Callable[[], None], grouped: bool, defer: bool, settings: dict[str, Any]
) -> None:
    linear = layer(grouped, **settings)
    named = {"counts": COUNTS} if grouped else {}
    expected, _ = run(linear, defer)
    as_on_a_gpu()
    found, _ = run(layer(grouped, **settings), defer, **named)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("defer", [False, True])
def test_w_after_swiglu_is_made_from_the_cache_on_a_gpu(as_on_a_gpu: Callable[[], None], defer: bool) -> None:
    def both(down: Any) -> tuple[list[Tensor], list[Tensor]]:
        gate_up = numbers(T, 2 * K, seed=3)
        hidden, kept = cached_swiglu(gate_up.requires_grad_(), torch.ones(T), down.recipe.cache)
        results, held = run(down, defer, kept=kept)
        return [hidden.detach(), *results], held

    expected, _ = both(layer(True, "experts_down"))
    as_on_a_gpu()
    found, held = both(layer(True, "experts_down"))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not defer or sum(t.nbytes for t in held if t.dtype == torch.float8_e4m3fn) == T * (K + N)


@pytest.mark.parametrize("high", ["bf16", "fp32"])
@pytest.mark.parametrize("scales", ["pow2", "v3"])
def test_an_emulated_layer_of_experts_on_a_gpu_waits_for_nothing(high: str, scales: str) -> None:
    """The meta device has no values to wait for, and torch's grouped product has BF16 alone there."""
    experts: Any = layer(True, high=high, scales=scales)
    experts.to("meta", torch.bfloat16 if high == "bf16" else torch.float32)
    x = torch.empty(T, K, dtype=experts.weight.dtype, device="meta", requires_grad=True)
    later: deque[Callable[[], None]] = deque()
    y = experts(x, torch.empty(3, dtype=torch.int32, device="meta"), counts=COUNTS)
    with experts.weight_queue.into(later):
        y.backward(torch.empty_like(y))
    drain(later)
    assert experts.weight.grad.shape == experts.weight.shape


def test_grouped_products_in_fp32_off_the_cpu_are_one_per_group_and_copy_no_offsets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products.F, "grouped_mm", None)  # on a GPU it would copy the offsets to the host
    every, ends = products.Products(widened=False), (100, 100, 256)
    a, b, dy = (torch.empty(size, device="meta") for size in ((T, K), (3, K, N), (T, N)))
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert every.multiply(a, b, offsets, ends).shape == (T, N)
        assert every.multiply(a.t(), dy, offsets, ends).shape == (3, K, N)
    assert counter.get_total_flops() == 2 * 2 * T * K * N
