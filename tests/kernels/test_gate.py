"""The router's kernels under Triton's interpreter, against their formulas."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.kernels.examples import EXAMPLES
from counterflow.kernels.gate import Gate
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.kernels import worker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

V3 = Gate(4, 4, 2, False, True, True, True, 2.5, 2)
V2 = Gate(3, 5, 2, True, False, False, False, 16.0, 2)
PLAIN = Gate(2, 1, 0, True, False, False, True, 1.0, 1)
# Rules, whether there is a bias, and sizes: sequences, tokens, experts.
CASES: dict[str, tuple[Gate, bool, tuple[int, int, int]]] = {
    "V3": (V3, True, (2, 37, 32)),
    "V3, one group": (replace(V3, groups=1, open_groups=0, most_groups=1), True, (1, 70, 8)),
    "V3, all groups": (replace(V3, open_groups=0, most_groups=4), True, (3, 5, 16)),
    "V3, groups of one": (replace(V3, groups=8, open_groups=4, most_groups=4), True, (1, 9, 8)),
    "V2, uneven": (V2, False, (2, 23, 35)),
    "top-k": (PLAIN, False, (1, 1, 6)),
    "top-k of one": (replace(PLAIN, top_k=1), False, (2, 3, 1)),
}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Function that runs an operation's kernel by its name, in a process where Triton interprets kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_interpreter) as pool:
        yield lambda name, *arguments: pool.submit(worker.interpreted, name, *arguments).result(timeout=100)


def inputs(case: str) -> tuple[Tensor, Tensor | None, Tensor, tuple[Any, ...]]:
    """Logits, bias, valid sequences, and the rules as numbers."""
    rules, biased, (batch, length, experts) = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    logits = torch.randn(batch, length, experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator) if biased else None
    return logits, bias, torch.arange(batch) != 1, astuple(rules)


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_their_formulas(run: Callable[..., Any], case: str) -> None:
    logits, bias, valid, rules = inputs(case)
    ids, weights, *sums = run("gate", logits, bias, *rules)
    expected = OPERATIONS["gate"].formula(logits, bias, *rules)
    assert torch.equal(ids, expected[0])
    assert torch.allclose(weights, expected[1], rtol=2e-6, atol=0)
    assert torch.allclose(sums[0], expected[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(sums[1], expected[3]) and torch.equal(sums[2], expected[4])

    length = logits.shape[1]
    made = run("gate_balance", *sums, valid, length, *rules)
    counts, losses, pulls = OPERATIONS["gate_balance"].formula(*sums, valid, length, *rules)
    assert torch.equal(made[0], counts) and made[0].dtype == torch.int64
    assert torch.allclose(made[1], losses, rtol=1e-5) and torch.allclose(made[2], pulls, rtol=1e-5)

    grads = [torch.tensor(0.7), torch.tensor(-0.2), None]
    of_weights = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    for given, of_losses in ((of_weights, [None] * 3), (None, grads), (of_weights, grads[::-1])):
        for halves in (False, True):
            arguments = given, of_losses, logits, ids, pulls, halves, *rules
            gradient, exact = run("gate_backward", *arguments), OPERATIONS["gate_backward"].formula(*arguments)
            assert gradient.dtype == exact.dtype and gradient.shape == exact.shape
            size = exact.float().abs().amax().item() + 1e-12
            experts = logits.shape[-1]
            both = [x.float().unflatten(1, (-1, experts)).sum(1) for x in (gradient, exact)]
            assert torch.allclose(*both, rtol=2e-5, atol=4e-6 * size)


def test_many_tokens_are_summed_in_several_tiles(run: Callable[..., Any]) -> None:
    rules = astuple(replace(PLAIN, top_k=1))
    logits = torch.randn(1, 9000, 2, generator=torch.Generator().manual_seed(0))
    ids, _, shares, hits, _ = run("gate", logits, None, *rules)
    assert shares.shape[1] < 128 and hits.sum((0, 1, 2)).tolist() == torch.bincount(ids.flatten()).tolist()
    assert torch.allclose(shares.sum((0, 1)), logits.softmax(-1).sum((0, 1)), rtol=1e-5)


def test_among_equal_scores_the_lower_number_is_chosen(run: Callable[..., Any]) -> None:
    logits = torch.zeros(1, 3, 32)
    logits[0, 1, 20:24], logits[0, 2, 9] = 5.0, -5.0
    ids, *_ = run("gate", logits, torch.zeros(32), *astuple(V3))
    assert ids.tolist() == [[0, 1, 2, 3], [20, 21, 22, 23], [0, 1, 2, 3]]


def test_scores_that_are_no_numbers_choose_distinct_experts(run: Callable[..., Any]) -> None:
    logits = torch.randn(1, 6, 32)
    logits[0, 0], logits[0, 1, 5], logits[0, 2], logits[0, 3] = torch.nan, torch.nan, torch.inf, -torch.inf
    bias = torch.zeros(32)
    for given in (bias, torch.full((32,), -torch.inf), torch.full((32,), torch.nan)):
        ids, weights, *_ = run("gate", logits, given, *astuple(V3))
        assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 32 for row in ids.tolist())
        assert weights[0].isnan().all()
    assert 5 in run("gate", logits, bias, *astuple(V3))[0][1].tolist()


def test_the_two_halves_of_a_gradient_hold_16_bits_of_it(run: Callable[..., Any]) -> None:
    logits, bias, valid, rules = inputs("V3")
    ids, weights, *sums = run("gate", logits, bias, *rules)
    pulls = run("gate_balance", *sums, valid, 37, *rules)[2]
    arguments = torch.randn(weights.shape), [torch.tensor(1.0), None, None], logits, ids, pulls
    whole, halves = (run("gate_backward", *arguments, given, *rules) for given in (False, True))
    high, low = halves.double().split(32, 1)
    assert bool(((high + low - whole.double()).abs() <= 2.0**-16 * whole.double().abs()).all())
    assert bool(((high - whole.double()).abs() > 2.0**-12 * whole.double().abs()).any()), "one half would do"


def test_a_router_of_the_examples_chooses_the_same_under_any_rounding() -> None:
    (example,) = (example for example in EXAMPLES if example.operation == "gate")
    logits, bias, *rules = example.on("cpu")
    chosen = [OPERATIONS["gate"].formula(logits + off, bias, *rules)[0] for off in (0.0, 1e-3 * torch.rand(256))]
    assert torch.equal(*chosen)
