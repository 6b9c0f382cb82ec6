"""Transformer Engine itself, on a supported GPU: the behaviour of the fake in tests/fp8, checked on the real library.

The tests were written without a GPU and have not been run yet. Quantisation is compared bit by bit. Products are
compared by norms: a Hopper tensor core adds with 14 bits, which is 1.3e-4 of a result (5e-4 leaves room), and rounding
the result to BF16 adds up to 2^-9 = 2e-3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.fp8.config import PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.quantize import fake_quantize, quantize
from counterflow.fp8.te import library as libraries
from counterflow.fp8.te.backend import TransformerEngine
from counterflow.fp8.te.library import Library
from counterflow.fp8.tensor_formats import Kind
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.layout import Layout
from counterflow.parallel.optimizer.adamw import Update, adamw
from counterflow.parallel.optimizer.fused_adamw import FusedAdamW
from counterflow.settings import UsageError
from counterflow.tests.training.harness import open_text, tiny, write_text
from counterflow.training.build import make_groups
from counterflow.training.trainer import Trainer
from counterflow.weight_gradients import WeightQueue, drain

DEVICE = torch.device("cuda")
T, K, N = 512, 576, 1536  # 576 is 4.5 tiles, the width of DeepSeek-V3's latents of keys and values
COUNTS = [128, 0, 288, 96]
PRODUCT, ROUNDED = 5e-4, 3e-3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return libraries.load(DEVICE)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture
def hopper(library: Library) -> Library:
    if library.microscaling:
        pytest.skip("this GPU multiplies in MXFP8, whose tiles are 1x32")
    return library


class Sums:
    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.told = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.buffers.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.float32))

    def arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is None
        self.told += 1


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Rows of different sizes; the same numbers on any device."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for size in sizes:
        wide = torch.randn(size, generator=generator)
        wide *= torch.exp2(torch.randint(-4, 4, (*size[:-1], 1), generator=generator))
        made.append(wide.to(DEVICE, dtype))
    return made


def layers(library: Library, grouped: bool, kind: Kind = "attention") -> list[Any]:
    """The emulated layer and the library's, with the same weight."""
    recipe = PrecisionConfig(recipe="fp8").make()
    (weight,) = tensors((4, N, K) if grouped else (N, K))
    made = []
    for chosen in (recipe, replace(recipe, backend=TransformerEngine(library, recipe.formats))):
        linear = chosen.linear(kind)
        layer = GroupedLinear(4, K, N, linear) if grouped else Linear(K, N, linear)
        layer.weight = nn.Parameter(weight.clone())
        made.append(layer)
    return made


def run(layer: Any, x: Tensor, dy: Tensor, **named: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    if isinstance(layer, GroupedLinear):
        named |= {"offsets": torch.tensor(COUNTS, device=DEVICE).cumsum(0).int(), "counts": COUNTS}
    y = layer(x, **named)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad]


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


both = pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])


@pytest.mark.parametrize("square", [False, True], ids=["1x128", "128x128"])
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "fp32 scales"])
@pytest.mark.parametrize("rows", [512, 200])
def test_the_library_quantises_to_our_bits(rows: int, pow2: bool, square: bool, hopper: Library) -> None:
    import transformer_engine_torch

    dtypes = getattr(hopper.pytorch, "DType", None) or transformer_engine_torch.DType
    quantizer = hopper.pytorch.Float8BlockQuantizer(
        dtypes.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        amax_epsilon=0.0,
        force_pow_2_scales=pow2,
        block_scaling_dim=2 if square else 1,
    )
    (x,) = tensors((rows, K))
    x[3, :256], x[5] = 0, x[5] * 2.0**-120  # empty tiles, and scales that are subnormal numbers
    theirs = quantizer(x)
    ours = quantize(x, (128, 128) if square else (1, 128), "e4m3", pow2)
    assert torch.equal(theirs._rowwise_data.view(torch.uint8), ours.data.view(torch.uint8))
    scale = theirs._rowwise_scale_inv
    scale = scale[:, : ours.scale.shape[1]] if square else scale[:, :rows].T  # stored transposed, padded to 4
    assert torch.equal(scale, ours.scale)
    along = quantize(x, (128, 128) if square else (128, 1), "e4m3", pow2)
    assert torch.equal(theirs._columnwise_data.view(torch.uint8), along.data.T.contiguous().view(torch.uint8))
    scale = theirs._columnwise_scale_inv
    scale = scale[:, : along.scale.shape[0]].T if square else scale[:, :K]
    assert torch.equal(scale, along.scale)


@both
def test_products_are_those_of_the_quantised_operands(grouped: bool, hopper: Library) -> None:
    _, layer = layers(hopper, grouped)
    sums = layer.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    y, dx = run(layer, x, dy)
    start = 0
    for expert, count in enumerate(COUNTS if grouped else [T]):
        rows = slice(start, start := start + count)
        if not count:
            assert not sums.buffers[layer.weight][expert].any()
            continue
        weight = layer.weight[expert] if grouped else layer.weight
        buffer = sums.buffers[layer.weight][expert] if grouped else sums.buffers[layer.weight]
        w = fake_quantize(weight.detach(), (128, 128)).double()
        xs, dys = (fake_quantize(part[rows], (1, 128)).double() for part in (x, dy))
        assert error(y[rows], xs @ w.T) < ROUNDED and error(dx[rows], dys @ w) < ROUNDED
        xs, dys = (fake_quantize(part[rows], (128, 1)).double() for part in (x, dy))
        assert error(buffer, dys.T @ xs) < PRODUCT


@both
def test_it_agrees_with_emulation(grouped: bool, hopper: Library) -> None:
    emulated, theirs = layers(hopper, grouped, "experts_up" if grouped else "attention")
    x, dy = tensors((T, K), (T, N))
    for expected, found in zip(run(emulated, x, dy), run(theirs, x, dy), strict=True):
        assert error(found, expected) < ROUNDED
    assert error(theirs.weight.grad, emulated.weight.grad) < ROUNDED


@both
def test_products_in_mxfp8_are_near_those_in_bf16(grouped: bool, library: Library) -> None:
    """The bound holds for block scaling as well: E4M3 has 4 significant bits, and errors of 3 % average out."""
    _, layer = layers(library, grouped)
    sums = layer.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    y, dx = run(layer, x, dy)
    start = 0
    for expert, count in enumerate(COUNTS if grouped else [T]):
        rows = slice(start, start := start + count)
        if count:
            weight = (layer.weight[expert] if grouped else layer.weight).double()
            buffer = sums.buffers[layer.weight][expert] if grouped else sums.buffers[layer.weight]
            assert error(y[rows], x[rows].double() @ weight.T) < 0.06
            assert error(dx[rows], dy[rows].double() @ weight) < 0.06
            assert error(buffer, dy[rows].double().T @ x[rows].double()) < 0.06


@both
def test_micro_batches_add_up_on_one_quantised_weight(grouped: bool, library: Library) -> None:
    """`is_first_microbatch` False adds to the gradient, and keeps the weight until ours has changed."""
    _, layer = layers(library, grouped)
    sums = layer.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    first, _ = run(layer, x, dy)
    once = sums.buffers[layer.weight].clone()
    again, _ = run(layer, x, dy)
    assert torch.equal(first, again)
    assert error(sums.buffers[layer.weight], 2 * once) < 1e-6 and sums.told == 2
    inside = layer._engine._module
    assert inside._quantised, "the library keeps no quantised weight where it did in the releases that were read"
    kept = dict(inside._quantised)
    layer.weight.detach().mul_(2)  # scales are powers of two: everything doubles
    doubled, _ = run(layer, x, dy)
    assert torch.equal(doubled, 2 * first)
    assert all(inside._quantised[name] is not tensor for name, tensor in kept.items())
    with torch.no_grad():
        layer(x, **({"offsets": torch.tensor(COUNTS, device=DEVICE).cumsum(0).int()} if grouped else {}))
    run(layer, x, dy)


@both
def test_gradients_put_off_are_the_same(grouped: bool, library: Library) -> None:
    _, layer = layers(library, grouped)
    sums, layer.weight_queue = Sums(), WeightQueue()
    layer.gradients = sums
    x, dy = tensors((T, K), (T, N))
    run(layer, x, dy)
    once, later = sums.buffers[layer.weight].clone(), deque[Callable[[], None]]()
    with layer.weight_queue.into(later):
        run(layer, x, dy)
    assert torch.equal(sums.buffers[layer.weight], once) and sums.told == 1
    drain(later)
    assert error(sums.buffers[layer.weight], 2 * once) < 1e-6 and sums.told == 2


@pytest.mark.parametrize("kind", ["attention_out", "experts_down"])
def test_a_cache_stands_for_the_input(kind: Kind, hopper: Library) -> None:
    emulated, theirs = layers(hopper, kind == "experts_down", kind)
    x, dy = tensors((T, K), (T, N))
    gradients = []
    for layer in (emulated, theirs):
        kept = layer.keep(x)
        assert kept is not None
        run(layer, x, dy, kept=kept.and_then((), lambda again: again * 2))  # so that the restored x differs from x
        gradients.append(layer.weight.grad)
    assert error(gradients[1], gradients[0]) < ROUNDED


def test_rows_are_padded(library: Library) -> None:
    _, layer = layers(library, grouped=False)
    x, dy = tensors((T, K), (T, N))
    whole, _ = run(layer, x, dy)
    for rows in (1, 5, 37):
        part, _ = run(layer, x[:rows], dy[:rows])
        assert error(part, whole[:rows]) < ROUNDED


@pytest.mark.parametrize("widths", [(192, 128), (48, 32)], ids=str)
def test_attention_equals_a_softmax_over_all_scores(widths: tuple[int, int], library: Library) -> None:
    heads, length, (qk, v) = 4, 256, widths
    attend = TransformerEngine(library, {}).attention(heads, qk, v)
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, length, heads, width) for width in (qk, qk, v, v)]
    made = [torch.randn(size, generator=generator).to(DEVICE, torch.bfloat16) for size in sizes]
    query, key, value, dy = (part.transpose(1, 2) for part in made)
    query = query * qk**-0.5
    results = []
    for function in (attend, _attention_in_fp64):
        parts = [part.detach().clone().requires_grad_() for part in (query, key, value)]
        y = function(*parts)
        y.backward(dy.to(y.dtype))
        results.append([y, *(part.grad for part in parts)])
    for found, expected in zip(*results, strict=True):
        assert found is not None and expected is not None and error(found, expected) < 2e-2


def _attention_in_fp64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query.double() @ key.double().mT).masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=str)
def test_fused_adam_is_our_adamw(moments: torch.dtype, library: Library) -> None:
    config = OptimConfig()
    (master,) = tensors((1, 5000), dtype=torch.float32)
    ours = [master.flatten(), *(torch.zeros(5000, dtype=moments, device=DEVICE) for _ in range(2))]
    theirs, fused = [part.clone() for part in ours], FusedAdamW(library)
    for step in (1, 2, 3):
        gradient = tensors((step, 5000), dtype=torch.float32)[0][-1].contiguous()
        now = Update(1e-2, step, gradient_scale=0.5)
        adamw(ours[0], gradient, ours[1], ours[2], config, 0.1, now)
        fused(theirs[0], gradient, theirs[1], theirs[2], config, 0.1, now)
        assert torch.allclose(theirs[0], ours[0], rtol=1e-4, atol=1e-6)
        for mine, other in zip(ours[1:], theirs[1:], strict=True):  # one rounding of what is stored
            assert torch.allclose(other.float(), mine.float(), rtol=2**-7 if moments == torch.bfloat16 else 1e-5)


def test_gradients_of_layers_that_are_not_quantised_are_added_unrounded() -> None:
    layer = Linear(K, N)
    layer.weight = nn.Parameter(tensors((N, K))[0])
    sums = layer.gradients = Sums()
    x, dy = tensors((T, K), (T, N))
    run(layer, x, dy)
    run(layer, x, dy)
    assert sums.told == 2
    assert error(sums.buffers[layer.weight], 2 * (dy.double().T @ x.double())) < 1e-5


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["none", "v3", "full"])
def test_a_step_of_training_is_emulations(recompute: str, library: Library, one_process: None, tmp_path: Path) -> None:
    """The whole model: losses, norm of the gradient and two updates."""
    text = write_text(tmp_path / "text")
    wide = ["model.hidden_size=128", "model.moe_intermediate_size=64", "model.kv_lora_rank=32", "model.q_lora_rank=64"]
    wide += ["model.qk_rope_head_dim=32", "batch.sequence_length=64", "precision.recipe=fp8"]
    losses = {}
    for backend in ("emulated", "te"):
        config = tiny(text, *wide, f"memory.recompute={recompute}", f"precision.backend={backend}")
        trainer = Trainer(config, make_groups(config, Layout(1, 1, 1), DEVICE.type), DEVICE, open_text(config))
        assert (trainer.model.recipe.backend is not None) == (backend == "te")
        steps = [trainer.step() for _ in range(3)]
        losses[backend] = [(step.loss, step.grad_norm) for step in steps] + [(trainer.evaluate(), 1.0)]
        trainer.close()
    for (loss, norm), (expected, expected_norm) in zip(losses["te"], losses["emulated"], strict=True):
        assert abs(loss - expected) < 1e-2 * expected and abs(norm - expected_norm) < 5e-2 * expected_norm
