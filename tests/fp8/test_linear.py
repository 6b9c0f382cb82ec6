"""FP8 linear layers against products written out with an independent quantiser, and the tensors that they keep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.kept import Kept
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.recipe import LinearRecipe
from counterflow.fp8.tensor_formats import KINDS, Kind
from counterflow.tests.fp8.oracle import quantize_tiles
from counterflow.weight_gradients import WeightQueue, drain

T, K, N = 300, 200, 136  # partial tiles on every side


def recipe(kind: Kind = "attention", **settings: Any) -> LinearRecipe:
    return PrecisionConfig(recipe="fp8", **settings).make().linear(kind)


def quantized(x: Tensor, rows: int, columns: int, fmt: str = "e4m3", pow2: bool = True) -> Tensor:
    """x `[M, K]` quantised and dequantised in tiles of rows x columns, FP64, tile by tile in integers."""
    result = torch.empty(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            tile = x[top : top + rows, left : left + columns]
            bits = tile.float().contiguous().numpy().view(np.uint32).reshape(1, -1)
            made = quantize_tiles(bits, fmt, pow2, 16 if x.dtype == torch.bfloat16 else 32)
            values = torch.from_numpy(made.values * made.scale[:, None].astype(np.float64)).view(tile.shape)
            result[top : top + rows, left : left + columns] = values
    return result


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Random numbers whose rows and columns all have different sizes, so that tiles have different scales."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for size in sizes:
        wide = torch.randn(size, generator=generator)
        wide *= torch.exp2(torch.randint(-6, 6, (*size[:-1], 1), generator=generator))
        made.append((wide * torch.exp2(torch.randint(-3, 3, size[-1:], generator=generator))).to(dtype))
    return made


def run(
    layer: Linear | GroupedLinear, x: Tensor, dy: Tensor, *more: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x, *more, **named)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether both are equal except for the order of FP32 sums, and one rounding to BF16."""
    error = (found.double() - expected).abs()
    return bool(
        (error <= expected.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0) + 1e-5 * expected.norm() / 100).all()
    )


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "fp32 scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_three_products_are_those_of_operands_quantised_along_the_contraction(dtype: torch.dtype, pow2: bool) -> None:
    (x, dy, w) = tensors((T, K), (T, N), (N, K), dtype=dtype)
    layer = Linear(K, N, recipe(classes={} if pow2 else {"*": ClassConfig(scales="fp32")}))
    layer.weight.data = w
    y, dx, dw = run(layer, x, dy)
    x_rows, weight = quantized(x, 1, 128, pow2=pow2), quantized(w, 128, 128, pow2=pow2)
    assert close(y, x_rows @ weight.T, dtype)
    assert close(dx, quantized(dy, 1, 128, pow2=pow2) @ weight, dtype)
    # W dequantises the tensor that fprop kept, and quantises it along the tokens.
    again = quantized(x_rows.float(), 128, 1, pow2=pow2)
    assert close(dw, quantized(dy, 128, 1, pow2=pow2).T @ again, dtype)
    assert not close(dw, dy.double().T @ x.double(), dtype), "unquantised products differ by more than the bound"


@pytest.mark.parametrize("counts", [[100, 0, 130, 70], [0, 0, 0, 300]], ids=str)
def test_grouped_products_are_each_experts_own(counts: list[int]) -> None:
    x, dy, w = tensors((T, K), (T, N), (4, N, K))
    together = GroupedLinear(4, K, N, recipe("experts_up"))
    together.weight.data = w
    y, dx, dw = run(together, x, dy, torch.tensor(counts).cumsum(0).int())
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert not dw[expert].any()
            continue
        alone = Linear(K, N, recipe("experts_up"))
        alone.weight.data = w[expert]
        expected = run(alone, x[rows], dy[rows])
        for found, value in zip((y[rows], dx[rows], dw[expert]), expected, strict=True):
            assert close(found, value.double(), torch.bfloat16)


def test_promoted_products_differ_from_fast_ones_by_the_order_of_sums() -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    results = []
    for products in ("fast", "promoted"):
        layer = Linear(K, N, recipe(products=products))
        layer.weight.data = w
        results.append(run(layer, x, dy))
    for fast, promoted in zip(*results, strict=True):
        assert (fast == promoted).double().mean() > 0.999
        assert close(fast, promoted.double(), torch.bfloat16)


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("products", ["fast", "promoted"])
def test_a_weight_gradient_put_off_has_the_same_bits(grouped: bool, products: str) -> None:
    x, dy, w = tensors((T, K), (T, N), (3, N, K) if grouped else (N, K))
    layer = GroupedLinear(3, K, N, recipe(products=products)) if grouped else Linear(K, N, recipe(products=products))
    layer.weight.data = w
    more = (torch.tensor([90, 90, T], dtype=torch.int32),) if grouped else ()
    _, _, at_once = run(layer, x, dy, *more)
    layer.weight_queue, later = WeightQueue(), deque[Callable[[], None]]()
    layer.weight.grad = None
    y = layer(x.clone().requires_grad_(), *more)
    with layer.weight_queue.into(later):
        y.backward(dy)
    assert layer.weight.grad is None and len(later) == 1
    drain(later)
    assert torch.equal(layer.weight.grad, at_once)


def saved_bytes(compute: Callable[[], object]) -> dict[torch.dtype, int]:
    """Bytes of each type that autograd keeps, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    total: dict[torch.dtype, int] = {}
    for tensor in found.values():
        total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
    return total


def test_the_input_is_kept_in_one_byte_and_its_scales() -> None:
    (x,) = tensors((T, K))
    layer = Linear(K, N, recipe()).bfloat16()
    scales = T * -(-K // 128) * 4
    assert saved_bytes(lambda: layer(x)) == {torch.float8_e4m3fn: T * K, torch.float32: scales}
    assert saved_bytes(lambda: layer(x, rebuilt=True)) == {torch.bfloat16: T * K * 2}, "who rebuilds it drops it"


def test_the_attentions_output_is_kept_in_twelve_bits() -> None:
    (x,) = tensors((T, K))
    layer = Linear(K, N, recipe("attention_out")).bfloat16()
    scales = T * -(-K // 128) * 4
    assert saved_bytes(lambda: layer(x, layer.keep(x))) == {torch.uint8: T * K * 3 // 2, torch.float32: scales}


def test_weight_gradients_see_the_attentions_output_as_e5m6() -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    layer = Linear(K, N, recipe("attention_out"))
    layer.weight.data = w
    y, _, dw = run(layer, x, dy, layer.keep(x))
    assert close(y, quantized(x, 1, 128) @ quantized(w, 128, 128).T, torch.bfloat16), "fprop sees x in E4M3"
    kept = quantized(x, 1, 128, "e5m6").bfloat16()
    assert close(dw, quantized(dy, 128, 1).T @ quantized(kept, 128, 1), torch.bfloat16)


def test_what_is_computed_from_a_cache_is_what_the_weight_gradient_sees() -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    layer = Linear(K, N, recipe())
    layer.weight.data = w
    kept = Kept((x,), lambda x: x).and_then((torch.full((T, 1), 2.0),), lambda x, factor: (x * factor).bfloat16())
    _, _, dw = run(layer, x, dy, kept)
    assert close(dw, quantized(dy, 128, 1).T @ quantized(2 * x, 128, 1), torch.bfloat16)


def test_a_changed_weight_is_quantised_anew() -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    layer = Linear(K, N, recipe())
    layer.weight.data = w
    before = run(layer, x, dy)
    with torch.no_grad():
        layer.weight.copy_(-w)
    after = run(layer, x, dy)
    assert torch.equal(after[0], -before[0]) and torch.equal(after[1], -before[1])
    assert torch.equal(after[2], before[2])


def test_a_weight_first_used_for_inference_serves_training() -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    fresh, used = Linear(K, N, recipe()), Linear(K, N, recipe())
    for layer in (fresh, used):
        layer.weight.data = w
    with torch.inference_mode():
        y = used(x)
    expected = run(fresh, x, dy)
    assert torch.equal(y, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(run(used, x, dy), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "changed"),
    [("input", (True, False, True)), ("weight", (True, True, False)), ("gradient", (False, True, True))],
)
def test_a_class_left_high_changes_the_products_it_takes_part_in(name: str, changed: tuple[bool, ...]) -> None:
    x, dy, w = tensors((T, K), (T, N), (N, K))
    results = []
    for classes in ({}, {f"attention.{name}": ClassConfig(format="high")}):
        layer = Linear(K, N, recipe(classes=classes))
        layer.weight.data = w
        results.append(run(layer, x, dy))
    assert tuple(not torch.equal(a, b) for a, b in zip(*results, strict=True)) == changed


def test_with_every_class_high_no_layer_quantises() -> None:
    made = PrecisionConfig(recipe="fp8", classes={"*": ClassConfig(format="high")}).make()
    assert not any(made.linear(kind).quantises for kind in KINDS)


def test_infinities_are_noticed_though_they_become_finite() -> None:
    (x,) = tensors((T, K))
    x[7, 5] = torch.inf
    made = PrecisionConfig(recipe="fp8").make()
    layer = Linear(K, N, made.linear("dense_up")).bfloat16()
    torch.nn.init.ones_(layer.weight)
    with torch.no_grad():
        assert layer(x).isfinite().all()
    assert made.monitor.infinite == ["dense_up.input"]
