"""The operations that a GPU runs, on a CPU: each is its formula there, and the graph around them is the GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.model import kernels as kernels_module
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import Output
from counterflow.tests.model.small import (
    build,
    global_gradients,
    random_tokens,
    relative_error,
    small_config,
    total_loss,
)

BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.03}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels_module, "on_gpu", lambda _: True)
    return


def train(
    policy: RecomputePolicy = "none", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Output, dict[str, Tensor]]:
    config = small_config(**changes)
    model = build(config, recompute=policy, dtype=dtype)
    output = model(random_tokens(config, 2, 37), torch.tensor([True, False]))
    total_loss(output).backward()
    return output, global_gradients(model)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0, "q_lora_rank": None}], ids=str)
def test_losses_and_gradients_are_those_of_the_cpus_branch(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_gradients = train(dtype=dtype, **changes)
    monkeypatch.setattr(kernels_module, "on_gpu", lambda _: True)
    output, gradients = train(dtype=dtype, **changes)
    assert relative_error(output.loss, expected.loss) < BOUND[dtype]
    assert relative_error(output.balance, expected.balance) < BOUND[dtype]
    if dtype == torch.float32:
        assert torch.equal(output.counts, expected.counts)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        # In BF16 a token may choose another expert: only the size of the gradients is compared there.
        assert relative_error(gradients[name], gradient) < (BOUND[dtype] if dtype == torch.float32 else 0.5), name


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("policy", ["v3", "full"])
def test_recomputation_gives_the_same_bits(policy: RecomputePolicy, dtype: torch.dtype, as_on_a_gpu: None) -> None:
    expected, expected_gradients = train(dtype=dtype)
    output, gradients = train(policy, dtype)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.balance, expected.balance)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


def test_without_gradients_the_branch_runs_too(as_on_a_gpu: None) -> None:
    config = small_config()
    model = build(config)
    with torch.no_grad():
        assert model(random_tokens(config, 1, 9)).loss.isfinite()


def test_a_stream_without_a_used_norm_passes_its_gradient_on() -> None:
    x, gain = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    total, *normed = kernels_module.NormFunction.apply(x, torch.randn(3, 8, requires_grad=True), gain, 1e-6, 3)
    total.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, torch.ones(3, 8)) and gain.grad is None  # type: ignore[arg-type]
    x.grad = None
    normed[1].sum().backward()
    leaf = total.detach().requires_grad_()
    (leaf / (leaf.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum().backward()
    assert relative_error(x.grad, leaf.grad) < 1e-5  # type: ignore[arg-type]
