"""Weight gradients that layers add to an optimizer's sums: the bits of autograd's on a CPU, products on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.fp8 import linear
from counterflow.fp8.config import PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.weight_gradients import GradientSum, WeightQueue, attach_sum, drain, plain_autograd, sink_of

T, K, N = 40, 24, 16
COUNTS = [10, 0, 27, 3]
FORMATS = ["plain", "fp8"]


class Sums:
    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.told = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.buffers.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.float32))

    def arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is None
        self.told += 1


def make(grouped: bool, precision: str, device: str = "cpu") -> Linear | GroupedLinear:
    recipe = PrecisionConfig(recipe="fp8").make().linear("attention") if precision == "fp8" else None
    layer = GroupedLinear(len(COUNTS), K, N, recipe) if grouped else Linear(K, N, recipe)
    nn.init.normal_(layer.weight)
    layer.weight_queue = WeightQueue()
    return layer.to(device, torch.bfloat16)


def inputs(grouped: bool, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
    x, dy = (torch.randn(T, width, dtype=torch.bfloat16, device=device) for width in (K, N))
    offsets = torch.tensor(COUNTS, device=device).cumsum(0).int()
    return x.requires_grad_(), dy, {"offsets": offsets, "counts": COUNTS} if grouped else {}


@pytest.mark.parametrize("put_off", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_on_a_cpu_a_sum_gets_the_bits_that_autograd_would(grouped: bool, precision: str, put_off: bool) -> None:
    torch.manual_seed(0)
    layer, sums, expected = make(grouped, precision), Sums(), torch.zeros(())
    passes = [inputs(grouped) for _ in range(3)]
    for x, dy, more in passes:
        layer.weight.grad = None
        layer(x, **more).backward(dy)
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
        expected = expected + layer.weight.grad.float()
    layer.weight.grad = None
    layer.gradients, later = sums, deque[Callable[[], None]]()
    for number, (x, dy, more) in enumerate(passes):
        x.grad = None
        y = layer(x, **more)
        with layer.weight_queue.into(later if put_off else None):
            y.backward(dy)
        assert sums.told == (0 if put_off else number + 1) and x.grad is not None
    drain(later)
    assert sums.told == 3 and torch.equal(sums.buffers[layer.weight], expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_plain_autograd_and_frozen_weights_leave_the_sums_alone(grouped: bool) -> None:
    layer, sums = make(grouped, "plain"), Sums()
    layer.gradients = sums
    x, dy, more = inputs(grouped)
    with plain_autograd():
        y = layer(x, **more)
    y.backward(dy)  # the forward decides
    assert layer.weight.grad is not None and not sums.told
    layer.weight.requires_grad_(False)
    layer(x, **more).backward(dy)
    assert not sums.told


def test_a_layer_whose_input_needs_no_gradient_adds_its_own() -> None:
    layer, sums = make(False, "plain"), Sums()
    layer.gradients = sums
    x, dy, _ = inputs(False)
    layer(x.detach()).backward(dy)
    assert sums.told == 1 and sums.buffers[layer.weight].any() and layer.weight.grad is None


class _Operations(TorchDispatchMode):
    """Operations that run, each with the bytes of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        new = isinstance(made, Tensor) and func._schema.returns[0].alias_info is None
        self.seen.append((func._schema.name, made.nbytes if new else 0))
        return made


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_off_the_cpu_products_add_to_the_sum_and_make_nothing(grouped: bool) -> None:
    """One product for each expert with rows; counts on the host make the host wait for nothing."""
    layer, sums = make(grouped, "plain", "meta"), Sums()
    layer.gradients, later = sums, deque[Callable[[], None]]()
    x, dy, more = inputs(grouped, "meta")
    y = layer(x, **more)
    with layer.weight_queue.into(later):
        y.backward(dy)
    with _Operations() as operations:
        drain(later)
    products = [name for name, _ in operations.seen if name == "counterflow::add_product"]
    assert len(products) == (sum(count > 0 for count in COUNTS) if grouped else 1)
    assert sum(size for _, size in operations.seen) == 0 and sums.told == 1


def test_each_experts_product_goes_to_its_own_part_of_the_sum() -> None:
    torch.manual_seed(0)
    x, dy, more = inputs(True)
    buffer, told = torch.ones(len(COUNTS), N, K), []
    linear._add_products(x.detach(), dy, more["offsets"], None, GradientSum(buffer, lambda: told.append(1)))
    bounds = [0, *more["offsets"].tolist()]
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        expected = 1 + dy[start:stop].double().T @ x[start:stop].double()
        assert torch.allclose(buffer[expert].double(), expected, rtol=1e-5, atol=1e-4)
    assert told == [1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_rank_without_any_row_makes_no_product(device: str) -> None:
    layer = make(True, "plain", device)
    x = torch.empty(0, K, dtype=torch.bfloat16, device=device, requires_grad=True)
    with _Operations() as operations:
        y = layer(x, torch.zeros(len(COUNTS), dtype=torch.int32, device=device), counts=[0] * len(COUNTS))
        y.backward(torch.empty_like(y))
    assert y.shape == (0, N) and x.grad is not None and x.grad.shape == x.shape
    assert layer.weight.grad is not None and layer.weight.grad.shape == layer.weight.shape
    assert device == "meta" or not layer.weight.grad.any()
    assert not [name for name, _ in operations.seen if "grouped_mm" in name or "bmm" in name]


def test_a_parameter_finds_its_sum_while_somebody_keeps_it() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    assert sink_of(parameter) is None
    total = GradientSum(torch.zeros(3), lambda: None)
    attach_sum(parameter, total)
    assert sink_of(parameter) is total
    with plain_autograd():
        assert sink_of(parameter) is None
    parameter.requires_grad_(False)
    assert sink_of(parameter) is None
    parameter.requires_grad_(True)
    del total
    assert sink_of(parameter) is None
