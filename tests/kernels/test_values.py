"""Values of the fused kernels under Triton's interpreter, against autograd of the plain formulas in FP64."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.kernels.norm import MOST_PARTS, WIDEST, parts
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.kernels import worker

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
pytestmark = needs_triton

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float32)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}
"""Relative error of one rounding, and of FP32 sums of the sizes below."""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Function that runs an operation's kernel by its name, in a process where Triton interprets kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_interpreter) as pool:
        yield lambda name, *arguments: pool.submit(worker.interpreted, name, *arguments).result(timeout=100)


def numbers(*sizes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


def close(made: Tensor, exact: Tensor, scale: Tensor | None = None) -> None:
    """Check that `made` is `exact` FP64, rounded; `scale` is the size of the addends where they cancel."""
    assert made.shape == exact.shape
    bound = ROUNDING[made.dtype] * exact.abs() + 2e-6 * (exact.abs() if scale is None else scale) + 1e-30
    assert bool(((made.double() - exact).abs() <= bound).all()), (made.double() - exact).abs().max()


def exact_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * gain


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


# RMSNorm


SIZES = [(0, 40), (1, 7), (5, 576), (37, 512), (300, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms_are_the_formulas(run: Callable[..., Any], size: tuple[int, int], dtype: torch.dtype) -> None:
    x, addend, gain = numbers(*size, dtype=dtype), numbers(*size, dtype=dtype, seed=1), numbers(size[1], dtype=dtype)
    close(run("rms_norm", x, gain, EPS), exact_norm(x.double(), gain.double()))
    total, normed = run("add_rms_norm", x, addend, gain, EPS)
    assert torch.equal(total, x + addend)
    close(normed, exact_norm(total.double(), gain.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grads", [1, 2, 3])
def test_the_backward_of_a_norm_is_autograds(
    run: Callable[..., Any], size: tuple[int, int], dtype: torch.dtype, grads: int
) -> None:
    x, gain = numbers(*size, dtype=dtype), numbers(size[1], dtype=dtype)
    pulls = [numbers(*size, dtype=dtype, seed=2 + index) for index in range(grads)]
    passed = numbers(*size, dtype=dtype, seed=9) if grads != 2 else None
    grad_x, partial = run("rms_norm_backward", pulls, passed, x, gain, EPS)
    wide_x, wide_gain = leaves(x, gain)
    pull = sum(pull.double() for pull in pulls)
    exact_norm(wide_x, wide_gain).backward(pull)
    expected = wide_x.grad if passed is None else wide_x.grad + passed.double()
    # Products of the gradient and the gain cancel: the error is that of the addends, all of them within a row.
    addends = (pull * gain.double() / x.double().abs().clamp(min=0.05)).abs().amax(-1, keepdim=True).expand(size)
    close(grad_x, expected, addends + expected.abs())
    assert partial.shape == (parts(*size), size[1]) and partial.dtype == torch.float32
    terms = (pull * exact_norm(x.double(), torch.ones(size[1]).double())).abs().sum(0)
    for kind in DTYPES:
        close(run("sum_rows", partial, kind), wide_gain.grad, terms)


@pytest.mark.parametrize("size", [(0, 40), (1, 7), (130, 72)], ids=str)
def test_sums_are_added_to_a_sum(run: Callable[..., Any], size: tuple[int, int]) -> None:
    partial, total = numbers(*size, dtype=torch.float32), numbers(size[1], dtype=torch.float32, seed=1)
    exact = total.double() + partial.double().sum(0)
    made = run("add_rows", total.clone(), partial)
    close(made, exact, total.double().abs() + partial.double().abs().sum(0))


def test_the_gradient_of_an_fp32_user_is_added_unrounded(run: Callable[..., Any]) -> None:
    x, gain = numbers(3, 64), numbers(64)
    wide = numbers(3, 64, dtype=torch.float32)
    made, _ = run("rms_norm_backward", [numbers(3, 64, seed=3), wide], None, x, gain, EPS)
    summed, _ = run("rms_norm_backward", [numbers(3, 64, seed=3).float() + wide], None, x, gain, EPS)
    assert torch.equal(made, summed)


def test_sums_of_a_gains_gradient_are_of_a_number_of_rows_that_no_gpu_chooses(run: Callable[..., Any]) -> None:
    assert parts(4096, 7168) == parts(10**6, 512) == MOST_PARTS and parts(0, 512) == 0 and parts(9, WIDEST + 1) == 1
    rows = 5 * MOST_PARTS + 3  # of 8192 columns, one row a program and turn
    partial = run("rms_norm_backward", [torch.ones(rows, 4100)], None, torch.ones(rows, 4100), torch.ones(4100), 0.0)[1]
    expected = torch.tensor([6.0] * 3 + [5.0] * (MOST_PARTS - 3))
    assert torch.allclose(partial, expected[:, None].expand(MOST_PARTS, 4100))


def test_rows_may_lie_apart_and_wide_ones_are_left_to_torch(run: Callable[..., Any]) -> None:
    both, gain, pull = numbers(6, 90), numbers(64), numbers(6, 64)
    apart, together = both[:, :64], both[:, :64].contiguous()
    assert torch.equal(run("rms_norm", apart, gain, EPS), run("rms_norm", together, gain, EPS))
    made, whole = (run("rms_norm_backward", [pull], None, x, gain, EPS) for x in (apart, together))
    assert torch.equal(made[0], whole[0]) and torch.equal(made[1], whole[1])
    x, gain = numbers(2, WIDEST + 8), numbers(WIDEST + 8)
    for name, arguments in (
        ("rms_norm", (x, gain, EPS)),
        ("add_rms_norm", (x, x, gain, EPS)),
        ("rms_norm_backward", ([x], x, x, gain, EPS)),
    ):
        made, formula = run(name, *arguments), OPERATIONS[name].formula(*arguments)
        for part, other in zip(made, formula, strict=True):
            assert torch.equal(part, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0, 4), (1, 1), (3, 1000)], ids=str)
def test_three_tensors_are_added_and_rounded_once(
    run: Callable[..., Any], size: tuple[int, int], dtype: torch.dtype
) -> None:
    each = [numbers(*size, dtype=dtype, seed=seed) for seed in range(3)]
    close(run("add_three", *each), sum(x.double() for x in each), sum(x.double().abs() for x in each))


# AdamW


@pytest.mark.parametrize("moments", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_the_update_is_the_formula(run: Callable[..., Any], count: int, moments: torch.dtype) -> None:
    """Gradients of many sizes, some of them zero: after a step from rest the weights move by the rate at most."""
    size = 10 ** -(torch.arange(count) % 9 - 1.0)
    master, gradient = numbers(count, dtype=torch.float32), numbers(count, dtype=torch.float32, seed=1) * size
    first = (numbers(count, dtype=torch.float32, seed=2) * size).to(moments)
    second = (numbers(count, dtype=torch.float32, seed=3) * size).square().to(moments)
    for part in (gradient, first, second):
        part[::7] = 0.0
    beta1, beta2, eps, scale, correction, kept, rate = 0.9, 0.95, 1e-8, 0.7, 0.4, 0.9995, 1e-3
    state = (master.clone(), gradient, first.clone(), second.clone())  # updated in place, and processes share memory
    made = run("adamw", *state, beta1, beta2, eps, scale, correction, kept, rate)
    wide = gradient.double() * scale
    new_first = beta1 * first.double() + (1 - beta1) * wide
    new_second = beta2 * second.double() + (1 - beta2) * wide.square()
    step = rate * new_first / ((new_second / correction).sqrt() + eps)
    close(made[0], kept * master.double() - step, master.double().abs() + step.abs())
    close(made[1], new_first, first.double().abs() + wide.abs())
    close(made[2], new_second)
    assert made[1].dtype == made[2].dtype == moments


# SwiGLU


def exact_swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.tensor_split(2, -1)
    hidden = gate * torch.sigmoid(gate) * up
    return hidden if weights is None else hidden * weights[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0, 12), (1, 5), (29, 72), (4, 2500)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_and_its_backward_are_autograds(
    run: Callable[..., Any], size: tuple[int, int], weighted: bool, dtype: torch.dtype
) -> None:
    rows, inner = size
    gate_up, pull = 3 * numbers(rows, 2 * inner, dtype=dtype), numbers(rows, inner, dtype=dtype)
    weights = numbers(rows, dtype=torch.float32) if weighted else None
    wide_gate_up, wide_weights = leaves(gate_up, torch.ones(rows) if weights is None else weights)
    exact = exact_swiglu(wide_gate_up, wide_weights)
    exact.backward(pull.double())
    close(run("swiglu", gate_up, weights), exact.detach(), 3 * exact.detach().abs())
    grad, grad_weights = run("swiglu_backward", pull, gate_up, weights)
    assert wide_gate_up.grad is not None and wide_weights.grad is not None
    size_of_terms = wide_gate_up.grad.abs() + 15.0**2 * pull.double().repeat(1, 2).abs()
    close(grad, wide_gate_up.grad, size_of_terms)
    if weights is None:
        assert grad_weights.shape == (0,)
    else:
        close(grad_weights, wide_weights.grad, (pull.double() * exact_swiglu(gate_up.double(), None)).abs().sum(-1))


def test_large_gates_do_not_overflow(run: Callable[..., Any]) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    made = run("swiglu", gate_up, None)
    assert torch.allclose(made.double(), torch.tensor([[0.0, 0.0, 0.0, 1000.0, 6e4]]).double(), rtol=0.01)
    assert run("swiglu_backward", torch.ones(1, 5).bfloat16(), gate_up, None)[0].isfinite().all()


# Queries, keys and values


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x `[B, S, A, R]` by `angles` `[S, R/2]`."""
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def exact_assemble(
    query: Tensor, key_value: Tensor, rotary_key: Tensor, angles: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of attention, tokens before heads."""
    heads, plain = query.shape[2], query.shape[-1] - rotary_key.shape[-1]
    shared = turned(rotary_key.unsqueeze(2), angles).expand(-1, -1, heads, -1)
    full_query = torch.cat((query[..., :plain], turned(query[..., plain:], angles)), -1) * scale
    return full_query, torch.cat((key_value[..., :plain], shared), -1), key_value[..., plain:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 9, 3, 8, 6, 7), (1, 1, 1, 3, 2, 1), (1, 3, 40, 16, 12, 16), (2, 0, 2, 8, 4, 8)], ids=str
)
def test_operands_of_attention_and_their_gradients_are_autograds(
    run: Callable[..., Any], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, length, heads, plain, rotated, value = sizes
    query = numbers(batch, length, heads, plain + rotated, dtype=dtype)
    key_value = numbers(batch, length, heads, plain + value, dtype=dtype)
    both = numbers(batch, length, 5 + rotated, dtype=dtype)
    rotary_key, angles = both[..., 5:], numbers(length, rotated // 2, dtype=torch.float32)
    rotary = torch.polar(torch.ones_like(angles), angles)
    wide = leaves(query, key_value, rotary_key)
    exact = exact_assemble(*wide, angles.double(), 0.37)
    made = run("assemble", query, key_value, rotary_key, rotary, 0.37)
    for part, exact_part in zip(made, exact, strict=True):
        close(part, exact_part.detach(), torch.full_like(exact_part, 4.0))

    # Gradients in each order in memory: heads before tokens, tokens before heads.
    pulls = [numbers(*x.shape, dtype=dtype, seed=5) for x in exact]
    torch.autograd.backward(exact, [pull.double() for pull in pulls])
    by_head = [pull.transpose(1, 2) for pull in pulls]
    by_head[1] = by_head[1].contiguous()
    grads = run("assemble_backward", *by_head, rotary, 0.37)
    for grad, leaf in zip(grads[:2], wide[:2], strict=True):
        assert leaf.grad is not None
        close(grad, leaf.grad, torch.full_like(leaf.grad, 4.0))
    # The sum over the heads is rounded, and then once more when it is turned.
    assert wide[2].grad is not None
    terms = pulls[1][..., plain:].double().abs().sum(2)
    allowed = 2 * ROUNDING[dtype] * (terms + terms.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    assert bool(((grads[2].double() - wide[2].grad).abs() <= allowed).all())
