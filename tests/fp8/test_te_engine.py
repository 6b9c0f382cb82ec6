"""Linear layers on the Transformer Engine backend, against emulated ones: the whole adapter on a fake library."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.recipe import LinearRecipe
from counterflow.fp8.te.backend import TransformerEngine
from counterflow.fp8.tensor_formats import Kind
from counterflow.settings import UsageError
from counterflow.tests.fp8 import fake_te
from counterflow.weight_gradients import WeightQueue, drain

T, K, N = 160, 192, 144  # partial tiles on every side
COUNTS = [32, 0, 96, 32]


class Sums:
    """The optimizer's part in accumulation: FP32 buffers, and a record of the reported gradients."""

    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.told = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.buffers.setdefault(parameter, torch.zeros(parameter.shape))

    def arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is None, "autograd has a gradient, too"
        self.told += 1


@pytest.fixture(autouse=True)
def as_emulated() -> Iterator[None]:
    """Make the fake compute as emulation does: all tests but one compare bits."""
    with fake_te.installed(emulated=True):
        yield


def recipes(kind: Kind, **settings: Any) -> tuple[LinearRecipe, LinearRecipe]:
    """Recipes of emulation and of the backend."""
    recipe = PrecisionConfig(recipe="fp8", **settings).make()
    emulated = recipe.linear(kind)
    backend = TransformerEngine.on(torch.device("cpu"), recipe.formats)
    theirs = replace(recipe, backend=backend).linear(kind)
    assert emulated is not None and theirs is not None
    return emulated, theirs


def tensors(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for size in sizes:
        wide = torch.randn(size, generator=generator)
        wide *= torch.exp2(torch.randint(-4, 4, (*size[:-1], 1), generator=generator))
        made.append(wide.to(torch.bfloat16))
    return made


def layers(grouped: bool, kind: Kind = "attention", **settings: Any) -> list[Linear | GroupedLinear]:
    (weight,) = tensors((4, N, K) if grouped else (N, K))
    made: list[Linear | GroupedLinear] = []
    for recipe in recipes(kind, **settings):
        layer = GroupedLinear(4, K, N, recipe) if grouped else Linear(K, N, recipe)
        layer.weight.data = weight.clone()
        made.append(layer)
    return made


def run(layer: Any, x: Tensor, dy: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    if isinstance(layer, GroupedLinear):
        named["offsets"] = torch.tensor(COUNTS).cumsum(0).int()
    y = layer(x, **named)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


both = pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])


@both
@pytest.mark.parametrize("classes", [{}, {"*.gradient": {"format": "e5m2"}}, {"*": {"scales": "fp32"}}], ids=str)
def test_backend_gives_the_bits_of_emulation(grouped: bool, classes: dict[str, Any]) -> None:
    given = {pattern: ClassConfig(**values) for pattern, values in classes.items()}
    emulated, theirs = layers(grouped, "experts_up" if grouped else "attention", classes=given)
    x, dy = tensors((T, K), (T, N))
    for expected, found in zip(run(emulated, x, dy), run(theirs, x, dy), strict=True):
        assert torch.equal(found, expected)
    assert emulated.weight.grad is not None and theirs.weight.grad is not None
    assert torch.equal(theirs.weight.grad, emulated.weight.grad)


@both
def test_as_the_library_computes_gradients_differ_by_one_rounding(grouped: bool) -> None:
    """The library quantises x along the rows from x itself, and adds gradients in FP32; emulation rounds to BF16."""
    emulated, theirs = layers(grouped)
    x, dy = tensors((T, K), (T, N))
    with fake_te.installed(emulated=False):
        sums = theirs.gradients = Sums()
        run(emulated, x, dy), run(theirs, x, dy)
    buffer, expected = sums.buffers[theirs.weight], emulated.weight.grad
    assert expected is not None
    assert not torch.equal(buffer, expected.float()), "the fake did round"
    assert ((buffer - expected.float()).abs() <= buffer.abs() * 2**-8 + 1e-4 * buffer.abs().max()).all()


@both
def test_weights_are_ours_and_autograd_never_sees_a_gradient(grouped: bool) -> None:
    _, layer = layers(grouped)
    sums = layer.gradients = Sums()
    (x, dy) = tensors((T, K), (T, N))
    run(layer, x, dy)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] == [*layer.state_dict()]
    assert layer.weight.grad is None and not hasattr(layer.weight, "grad_added_to_main_grad")
    assert sums.told == 1 and sums.buffers[layer.weight].any()
    assert layer._engine is not None and layer._engine._module is not None
    inside = list(layer._engine._module.te.parameters())
    ours = layer.weight.untyped_storage().data_ptr()
    assert len(inside) == (4 if grouped else 1)
    assert all(parameter.untyped_storage().data_ptr() == ours for parameter in inside)


@both
def test_micro_batches_add_up_and_share_one_quantised_weight(grouped: bool) -> None:
    emulated, theirs = layers(grouped)
    sums = theirs.gradients = Sums()
    batches = [tensors((T, K), (T, N)), [t * 3 for t in tensors((T, K), (T, N))], tensors((T, K), (T, N))]
    expected = torch.zeros(emulated.weight.shape)
    for x, dy in batches:
        emulated.weight.grad = None
        run(emulated, x, dy), run(theirs, x, dy)
        assert emulated.weight.grad is not None
        expected += emulated.weight.grad
    assert torch.equal(sums.buffers[theirs.weight], expected)
    assert fake_te.CALLS["weight quantised"] == 1
    assert set(fake_te.FIRST) == {False}, "True would have overwritten what was added before"


@both
def test_a_changed_weight_is_quantised_again(grouped: bool) -> None:
    emulated, theirs = layers(grouped)
    x, dy = tensors((T, K), (T, N))
    run(theirs, x, dy)
    for layer in (emulated, theirs):
        layer.weight.detach().mul_(1.5)  # as the optimizer does; a change through .data would go unnoticed
    for expected, found in zip(run(emulated, x, dy), run(theirs, x, dy), strict=True):
        assert torch.equal(found, expected)
    assert fake_te.CALLS["weight quantised"] == 2


@both
def test_an_evaluation_leaves_no_weight_without_its_copy_for_dgrad(grouped: bool) -> None:
    emulated, theirs = layers(grouped)
    x, dy = tensors((T, K), (T, N))
    named = {"offsets": torch.tensor(COUNTS).cumsum(0).int()} if grouped else {}
    with torch.no_grad():
        assert torch.equal(theirs(x, **named), emulated(x, **named))
    assert torch.equal(run(theirs, x, dy)[1], run(emulated, x, dy)[1])
    assert fake_te.FIRST == [None, False]


@both
def test_deferred_gradients_wait_for_their_turn_and_are_told_then(grouped: bool) -> None:
    emulated, theirs = layers(grouped)
    sums, queue = Sums(), WeightQueue()
    theirs.gradients, theirs.weight_queue = sums, queue
    later: list[deque[Callable[[], None]]] = [deque(), deque()]
    batches = [tensors((T, K), (T, N)), [t * 3 for t in tensors((T, K), (T, N))]]
    expected = torch.zeros(emulated.weight.shape)
    for (x, dy), work in zip(batches, later, strict=True):
        emulated.weight.grad = None
        run(emulated, x, dy)
        assert emulated.weight.grad is not None
        expected += emulated.weight.grad
        with queue.into(work):
            run(theirs, x, dy)
    buffer = sums.buffers[theirs.weight]
    assert not buffer.any() and sums.told == 0 and [len(work) for work in later] == [1, 1]
    drain(later[1])  # a schedule may drain in the opposite order: the library adds the oldest first, in the end both
    assert sums.told == 1
    drain(later[0])
    assert sums.told == 2 and torch.equal(buffer, expected)


def test_rows_are_padded_to_what_the_gpu_takes() -> None:
    emulated, theirs = layers(grouped=False)
    for rows in (1, 5, 37, 160):
        x, dy = tensors((rows, K), (rows, N))
        emulated.weight.grad = theirs.weight.grad = None
        for expected, found in zip(run(emulated, x, dy), run(theirs, x, dy), strict=True):
            assert torch.equal(found, expected)
        assert emulated.weight.grad is not None and theirs.weight.grad is not None
        assert torch.allclose(theirs.weight.grad, emulated.weight.grad, rtol=2**-7, atol=1e-2)  # other sums of rows


def test_leading_dimensions_are_kept() -> None:
    emulated, theirs = layers(grouped=False)
    x, dy = tensors((4, 40, K), (4, 40, N))
    for expected, found in zip(run(emulated, x, dy), run(theirs, x, dy), strict=True):
        assert found.shape == expected.shape and torch.equal(found, expected)


def test_experts_without_rows_get_no_gradient_and_a_rank_without_rows_still_tells() -> None:
    emulated, theirs = layers(grouped=True)
    sums = theirs.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    run(theirs, x, dy)
    assert [bool(part.any()) for part in sums.buffers[theirs.weight]] == [count > 0 for count in COUNTS]
    nothing = torch.zeros(4, dtype=torch.int32)
    x = torch.empty(0, K, dtype=torch.bfloat16, requires_grad=True)
    y = theirs(x, nothing, counts=[0, 0, 0, 0])
    assert y.shape == (0, N) and y.requires_grad
    y.backward(y.detach())
    assert x.grad is not None and x.grad.shape == (0, K)
    assert sums.told == 2, "else a bucket would wait for it until the end of the step"
    emulated.weight.grad = None


def test_rows_of_experts_that_are_not_aligned_are_a_bug() -> None:
    _, theirs = layers(grouped=True)
    (x,) = tensors((20, K))
    with pytest.raises(AssertionError, match="multiples of 16, not 4"):
        theirs(x, torch.tensor([16, 16, 16, 20]).int())


@pytest.mark.parametrize("kind", ["attention_out", "experts_down"])
def test_a_cache_stands_for_the_input_in_the_weights_gradient(kind: Kind) -> None:
    """V3's caches: E5M6 of the attention's output, and SwiGLU's input, from which the layer's input is made again."""
    grouped = kind == "experts_down"
    emulated, theirs = layers(grouped, kind)
    x, dy = tensors((T, K), (T, N))
    results = []
    for layer in (emulated, theirs):
        kept = layer.keep(x * 2)
        assert kept is not None
        kept = kept.and_then((torch.full((1,), 0.5),), lambda again, half: (again * half).to(torch.bfloat16))
        results.append((*run(layer, x, dy, kept=kept), layer.weight.grad))
    for expected, found in zip(*results, strict=True):
        assert expected is not None and found is not None and torch.equal(found, expected)


def test_an_input_that_is_made_again_is_not_kept() -> None:
    """The library saves the input's own memory in this case; recomputation finds this memory and drops it."""
    _, layer = layers(grouped=False)
    (x,) = tensors((T, K))
    x.requires_grad_()
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
        assert seen and x.data_ptr() not in seen
        layer(x, rebuilt=True)
        assert x.data_ptr() in seen


def test_the_librarys_queue_is_popped_once_a_backward() -> None:
    """With one call more Linear would raise; with one call less a later step would add an old gradient."""
    _, layer = layers(grouped=False)
    layer.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    run(layer, x, dy)
    run(layer, x, dy)
    assert fake_te.CALLS["TransformerEngineBaseModule.backward_dw"] == 2
    assert layer._engine is not None and layer._engine._module is not None
    with pytest.raises(RuntimeError, match="Pop empty queue"):
        layer._engine._module.backward_dw()


def test_blackwell_multiplies_in_microscaling_with_rows_of_32() -> None:
    with fake_te.installed(capability=(10, 0)):
        _, theirs = layers(grouped=False)
        assert theirs.recipe is not None and theirs.recipe.backend is not None and theirs.recipe.backend.alignment == 32
    (x,) = tensors((T, K))
    with pytest.raises(UsageError, match=r"takes outputs in multiples of 32 \(nearest: 128 or 160\)"):
        theirs(x)
    with fake_te.installed(capability=(10, 0)):
        wide = Linear(K, 160, theirs.recipe)
        (weight,) = tensors((160, K))
        wide.weight.data = weight
        y = wide(x)
        assert (y - x @ weight.T).norm() < 0.05 * y.norm()
        assert isinstance(wide._engine and wide._engine.recipe, fake_te.MXFP8BlockScaling)


def test_weights_in_fp32_are_refused() -> None:
    _, theirs = layers(grouped=False)
    theirs.weight.data = theirs.weight.data.float()
    with pytest.raises(UsageError, match=r"in BF16 here, and these are torch.float32 \(precision.high\)"):
        theirs(torch.zeros(16, K))
