"""Hand-written backwards against autograd of the plain formulas in FP64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.model import kernels as kernels_module
from counterflow.model.kernels import AssembleFunction, EmbeddingFunction, Kernels, RMSNormFunction, SwiGLUFunction
from counterflow.tests.model.small import relative_error

FORMATS = {torch.float32: 1e-6, torch.bfloat16: 0.006}  # relative error allowed; BF16 rounds by up to 0.004

SCALE = 0.37


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.tensor_split(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    return swiglu(gate_up) * weights[:, None]


def angles(length: int, width: int) -> Tensor:
    return torch.outer(torch.arange(length).double(), 10.0 ** -torch.arange(width).double())


def rotate(x: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x `[B, S, ..., R]` by their position's angles."""
    angle = angles(x.shape[1], x.shape[-1] // 2).view(1, x.shape[1], *(1,) * (x.dim() - 3), -1)
    first, second = x[..., ::2], x[..., 1::2]
    pairs = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.stack(pairs, -1).flatten(-2)


def assemble(query: Tensor, key_value: Tensor, rotary_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with their rotated part, and values, heads before positions."""
    heads, rotated = query.shape[2], rotary_key.shape[-1]
    plain = query.shape[-1] - rotated
    full_query = torch.cat((query[..., :plain], rotate(query[..., plain:])), -1) * SCALE
    shared = rotate(rotary_key).unsqueeze(2).expand(-1, -1, heads, -1)
    full_key = torch.cat((key_value[..., :plain], shared), -1)
    return full_query.transpose(1, 2), full_key.transpose(1, 2), key_value[..., plain:].transpose(1, 2)


def our_rms_norm(kernels: Kernels, x: Tensor, gain: Tensor) -> Tensor:
    return RMSNormFunction.apply(x, gain, 1e-6, kernels)


def our_swiglu(kernels: Kernels, gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    return SwiGLUFunction.apply(gate_up, weights, kernels)


def our_assemble(kernels: Kernels, query: Tensor, key_value: Tensor, rotary_key: Tensor) -> Any:
    table = angles(query.shape[1], rotary_key.shape[-1] // 2)
    rotary = torch.complex(table.cos(), table.sin()).to(torch.complex64)
    return AssembleFunction.apply(query, key_value, rotary_key, rotary, SCALE)


# Our kernel, the formula, and the shapes of the inputs; routing weights stay FP32.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (our_rms_norm, rms_norm, [(3, 7, 40), (40,)]),
    "rms_norm of a row": (our_rms_norm, rms_norm, [(1, 24), (24,)]),
    "swiglu": (our_swiglu, swiglu, [(3, 5, 48)]),
    "weighted swiglu": (our_swiglu, weighted_swiglu, [(29, 48), (29,)]),
    "assemble": (our_assemble, assemble, [(2, 9, 3, 14), (2, 9, 3, 15), (2, 9, 6)]),
    "assemble, one head": (our_assemble, assemble, [(1, 1, 1, 5), (1, 1, 1, 4), (1, 1, 2)]),
}


def random_inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    is_weight = [len(shape) == 1 and len(shapes[0]) == 2 and shape[0] == shapes[0][0] for shape in shapes]
    return [x if weight else x.to(dtype) for x, weight in zip(inputs, is_weight, strict=True)]


def with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of all inputs for a fixed random gradient of each result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    result_gradients = [
        torch.randn(result.shape, generator=generator).bfloat16().to(result.dtype) for result in results
    ]
    torch.autograd.backward(results, result_gradients)
    return [*(result.detach() for result in results), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_equal_the_formula(case: tuple[Any, Any, Any], dtype: torch.dtype) -> None:
    ours, formula, shapes = case
    inputs = random_inputs(shapes, dtype)
    exact = with_gradients(formula, [x.double() for x in inputs])
    actual = with_gradients(lambda *x: ours(Kernels.make(), *x), inputs)
    assert len(actual) == len(exact)
    for part, exact_part in zip(actual, exact, strict=True):
        assert relative_error(part, exact_part) < FORMATS[dtype]
    formats = [x.dtype for x in actual[len(actual) - len(inputs) :]]
    assert formats == [x.dtype for x in inputs]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("block", [1, 100, 40 * 6])
def test_blocks_of_rows_give_the_same_as_all_at_once(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in ("rms_norm", "swiglu", "weighted swiglu"):
        ours, _, shapes = CASES[case]
        inputs = random_inputs(shapes, dtype)
        whole = with_gradients(lambda *x, ours=ours: ours(Kernels.make(), *x), inputs)
        with monkeypatch.context() as patch:
            patch.setattr(kernels_module, "BLOCK_ELEMENTS", block)
            blocks = with_gradients(lambda *x, ours=ours: ours(Kernels.make(), *x), inputs)
        for actual, other in zip(blocks, whole, strict=True):
            assert actual.dtype == other.dtype
            assert relative_error(actual, other) < FORMATS[torch.float32] or actual.dim() == 1


def test_no_rows_give_no_rows() -> None:
    """A rank may receive no token."""
    inputs = [torch.empty(0, 48), torch.empty(0)]
    result, grad, grad_weights = with_gradients(lambda *x: our_swiglu(Kernels.make(), *x), inputs)
    assert result.shape == (0, 24) and grad.shape == (0, 48) and grad_weights.shape == (0,)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_inputs_may_be_slices_of_wider_tensors(case: tuple[Any, Any, Any]) -> None:
    ours, _, shapes = case
    inputs = random_inputs(shapes, torch.float32)
    wide = [torch.cat((x, x), -1) for x in inputs]

    def of_slices(*wide: Tensor) -> Any:
        return ours(Kernels.make(), *(x[..., : x.shape[-1] // 2] for x in wide))

    expected = with_gradients(lambda *x: ours(Kernels.make(), *x), inputs)
    for actual, other in zip(with_gradients(of_slices, wide), expected, strict=True):
        assert torch.allclose(actual[..., : other.shape[-1]], other, rtol=1e-5, atol=1e-6)


def compare_compiled_with_eager(cases: list[str], dtype: torch.dtype) -> None:
    """Compare in two sizes, as one compiled kernel serves every number of rows."""
    compiled = Kernels.make(compile=True)
    for ours, _, shapes in (CASES[case] for case in cases):
        for rows in (shapes[0][0], 2 * shapes[0][0] + 1):
            sizes = [(rows, *shape[1:]) if shape[0] == shapes[0][0] else shape for shape in shapes]
            inputs = random_inputs(sizes, dtype)
            fused = with_gradients(lambda *x, ours=ours: ours(compiled, *x), inputs)
            eager = with_gradients(lambda *x, ours=ours: ours(Kernels.make(), *x), inputs)
            for actual, other in zip(fused, eager, strict=True):
                assert actual.dtype == other.dtype
                assert relative_error(actual, other) < FORMATS[dtype]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_compiled_kernels_are_whole_and_equal_eager(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are traced whole but not compiled to C++, which would take a minute for all of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compare_compiled_with_eager(["rms_norm", "swiglu", "weighted swiglu"], dtype)


@pytest.mark.long(claim="test_compiled_kernels_are_whole_and_equal_eager")  # g++ takes half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_kernel_compiled_to_c_equals_eager() -> None:
    compare_compiled_with_eager(["swiglu"], torch.bfloat16)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_large_gates_do_not_overflow(dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype=dtype)
    result, grad = with_gradients(lambda x: our_swiglu(Kernels.make(), x), [gate_up])
    assert torch.allclose(result.double(), torch.tensor([[0.0, 0.0, 0.0, 1000.0, 6e4]]).double(), rtol=0.01)
    assert grad.isfinite().all()


def test_norm_of_large_bf16_activations_does_not_overflow() -> None:
    x, gain = torch.full((2, 64), 1e30, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    assert torch.equal(our_rms_norm(Kernels.make(), x * 1e-12, gain).float(), torch.ones(2, 64))


def embedding_gradient(
    embed: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, table: Tensor, pull: Tensor
) -> Tensor:
    leaf = table.clone().requires_grad_()
    rows = embed(tokens, leaf)
    assert torch.equal(rows, table[tokens])
    rows.backward(pull)
    assert leaf.grad is not None
    return leaf.grad


def test_the_gradient_of_a_frequent_token_does_not_stop_growing() -> None:
    """2000 fits BF16, but a BF16 sum of ones ends at 256."""
    tokens = torch.full((20, 100), 3)
    pull = torch.ones(20, 100, 8, dtype=torch.bfloat16)
    gradient = embedding_gradient(EmbeddingFunction.apply, tokens, torch.zeros(5, 8, dtype=torch.bfloat16), pull)
    expected = torch.zeros(5, 8, dtype=torch.bfloat16)
    expected[3] = 2000.0
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, expected)


def test_gradients_of_a_bf16_table_are_the_exact_sums_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (40 * torch.rand(6, 500, generator=generator) ** 3).long()  # some frequent, some rare
    pull = torch.randn(6, 500, 16, generator=generator).bfloat16()
    table = torch.randn(50, 16, generator=generator).bfloat16()
    gradient = embedding_gradient(EmbeddingFunction.apply, tokens, table, pull)
    exact = torch.zeros(50, 16, dtype=torch.float64).index_add_(0, tokens.flatten(), pull.flatten(0, 1).double())
    rounding = 2.0**-8 * exact.abs() + 1e-4  # BF16 once; FP32 sums of up to some hundred numbers of order 1
    assert ((gradient.double() - exact).abs() <= rounding).all()
    assert not gradient[40:].any(), "tokens that did not occur"


def test_gradients_of_an_fp32_table_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (3, 41), generator=generator)
    pull = torch.randint(-99, 99, (3, 41, 4), generator=generator).float()  # sums of whole numbers are exact
    table = torch.randn(7, 4, generator=generator)
    gradients = [embedding_gradient(embed, tokens, table, pull) for embed in (EmbeddingFunction.apply, F.embedding)]
    assert gradients[0].dtype == torch.float32
    assert torch.equal(*gradients)
