"""The stand-in for Transformer Engine: shapes, kernels, and what waits for the backward and for weight gradients."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.dryrun import transformer_engine as stand_in
from counterflow.fp8.config import PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.te import library as libraries
from counterflow.fp8.te.backend import TransformerEngine
from counterflow.fp8.tensor_formats import Kind
from counterflow.weight_gradients import WeightQueue, drain

T, K, N = 160, 256, 384
COUNTS = [64, 0, 96]


class Sums:
    """FP32 buffers of weight gradients on the meta device."""

    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.told = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.buffers.setdefault(parameter, parameter.new_empty(parameter.shape, dtype=torch.float32))

    def arrived(self, parameter: nn.Parameter) -> None:
        self.told += 1


class Watch(TorchDispatchMode):
    """Calls and FLOPs of the library's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("counterflow::")
        self.flops += stand_in.flops(name, args)
        if name.startswith("te_"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    libraries.STAND_INS["meta"] = stand_in.library()
    yield
    del libraries.STAND_INS["meta"]


def layer(kind: Kind, grouped: bool) -> Any:
    recipe = PrecisionConfig(recipe="fp8").make()
    recipe = replace(recipe, backend=TransformerEngine.on(torch.device("meta"), recipe.formats))
    made: Any = GroupedLinear(len(COUNTS), K, N, recipe.linear(kind)) if grouped else Linear(K, N, recipe.linear(kind))
    made = made.to("meta", torch.bfloat16)
    made.gradients, made.weight_queue = Sums(), WeightQueue()
    return made


def held_by(make: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Result, and the bytes of every tensor that autograd saves meanwhile."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return make(), sizes


@pytest.mark.parametrize("square", [False, True])
def test_scales_have_the_shapes_that_the_library_gives_them(square: bool) -> None:
    x = torch.empty(200, 384, dtype=torch.bfloat16, device="meta")
    codes, scales, codes_t, scales_t = torch.ops.counterflow.te_quantize(x, True, True, square)
    assert (codes.shape, codes_t.shape) == ((200, 384), (384, 200)) and codes.dtype == torch.uint8
    # Of Float8BlockQuantizer.get_scale_shape, release 2.20.2.
    assert (tuple(scales.shape), tuple(scales_t.shape)) == (((2, 4), (3, 4)) if square else ((3, 200), (2, 384)))


def test_a_plain_layer_quantises_once_multiplies_thrice_and_keeps_the_columns_of_its_input() -> None:
    linear = layer("attention", grouped=False)
    x = torch.empty(T, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Watch() as watch:
        y, saved = held_by(lambda: linear(x))
        assert watch.calls == {"te_quantize": 2, "te_product": 1}  # input and weight
        codes, scales = T * K, 4 * 2 * K  # of 128 x 1: two tiles down
        assert sorted(saved)[-3:] == sorted((scales, codes, N * K))  # and the weight's transposed copy
        y.backward(torch.empty_like(y))
        assert watch.calls == {"te_quantize": 3, "te_product": 3}
        linear(x)
        assert watch.calls == {"te_quantize": 4, "te_product": 4}  # the weight is quantised already
    assert watch.flops == 4 * 2 * T * K * N and linear.gradients.told == 1
    assert x.grad is not None and x.grad.shape == x.shape


def test_experts_are_computed_one_by_one_and_those_without_rows_not_at_all() -> None:
    experts = layer("experts_up", grouped=True)
    x = torch.empty(T, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    offsets = torch.empty(len(COUNTS), dtype=torch.int32, device="meta")
    with Watch() as watch:
        y = experts(x, offsets, counts=COUNTS)
        assert watch.calls == {"te_quantize": 2 + 3, "te_product": 2}
        y.backward(torch.empty_like(y))
    assert watch.calls == {"te_quantize": 7, "te_product": 6} and watch.flops == 3 * 2 * T * K * N


@pytest.mark.parametrize("grouped", [False, True])
def test_a_deferred_weight_gradient_holds_codes_for_its_own_product_alone(grouped: bool) -> None:
    linear = layer("experts_up" if grouped else "attention", grouped)
    x = torch.empty(T, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    more = (torch.empty(3, device="meta"), None, COUNTS) if grouped else ()
    later: deque[Callable[[], None]] = deque()
    y = linear(x, *more)
    with linear.weight_queue.into(later):
        y.backward(torch.empty_like(y))
    module = linear._engine._module.te
    ((inputs, gradients), _) = module.wgrad_store.context.queue[0]
    held = [tensor for operand in (*inputs, *gradients) for half in operand.codes for tensor in half]
    assert {tensor.dtype for tensor in held} == {torch.uint8, torch.float32}
    assert sum(t.nbytes for t in held if t.dtype == torch.uint8) == T * (K + N)
    assert linear.gradients.told == 0
    drain(later)
    assert not module.wgrad_store.context.queue and linear.gradients.told == 1


def test_a_cached_input_is_not_kept_and_is_quantised_in_the_backward() -> None:
    linear = layer("attention_out", grouped=False)
    x = torch.empty(T, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    kept = linear.keep(x)
    with Watch() as watch:
        y, saved = held_by(lambda: linear(x, kept))
        # Neither the input nor its columns, but the cache: codes in E5M6 and two scales a row.
        assert saved == [T * (K + K // 2), T * 2 * 4]
        y.backward(torch.empty_like(y))
    assert watch.calls == {"te_quantize": 4, "te_product": 3}
