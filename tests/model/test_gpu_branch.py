"""The operations that a GPU runs, on a CPU: each is its formula there, and the graph around them is the GPU's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.model import kernels as kernels_module
from counterflow.model import router as router_module
from counterflow.model.naming import local_parameters
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import MicroBatch, Output
from counterflow.phases import Uncut, run
from counterflow.tests.model.small import (
    build,
    global_gradients,
    random_tokens,
    relative_error,
    small_config,
    total_loss,
)
from counterflow.weight_gradients import GradientSum, attach_sum

BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.03}


def take_the_gpus_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels_module, router_module):
        monkeypatch.setattr(module, "on_gpu", lambda _: True)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_gpus_branch(monkeypatch)


def train(
    policy: RecomputePolicy = "none", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Output, dict[str, Tensor]]:
    config = small_config(**changes)
    model = build(config, recompute=policy, dtype=dtype)
    output = model(random_tokens(config, 2, 37), torch.tensor([True, False]))
    (total_loss(output) + 0.4 * output.device + 0.2 * output.communication).backward()
    return output, global_gradients(model)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_shared_experts": 0, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False},
        {"topk_method": "greedy", "scoring_func": "softmax", "n_routed_experts": 12},
        {"topk_method": "greedy", "scoring_func": "sigmoid", "num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_cpus_branch(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_gradients = train(dtype=dtype, **changes)
    take_the_gpus_branch(monkeypatch)
    output, gradients = train(dtype=dtype, **changes)
    assert relative_error(output.loss, expected.loss) < BOUND[dtype]
    for loss, other in ((output.balance, expected.balance), (output.device, expected.device)):
        assert relative_error(loss, other) < BOUND[dtype]
    assert relative_error(output.communication, expected.communication) < BOUND[dtype]
    assert not output.dropped.any() and output.dropped.shape == expected.dropped.shape
    if dtype == torch.float32:
        assert torch.equal(output.counts, expected.counts)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        # In BF16 a token may choose another expert, so gradients are compared in FP32 alone.
        assert dtype != torch.float32 or relative_error(gradients[name], gradient) < BOUND[dtype], name


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("policy", ["v3", "full"])
def test_recomputation_gives_the_same_bits(policy: RecomputePolicy, dtype: torch.dtype, as_on_a_gpu: None) -> None:
    expected, expected_gradients = train(dtype=dtype)
    output, gradients = train(policy, dtype)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.balance, expected.balance)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


def test_gradients_of_gains_and_of_the_router_go_to_the_optimizers_sums(as_on_a_gpu: None) -> None:
    config = small_config()
    _, expected = train()
    model = build(config)
    arrived, sums = [], {}
    for item in local_parameters(model):
        (name, *_), parameter = item.names, item.parameter
        if name.endswith(("norm", "gate")):
            buffer = torch.ones(parameter.shape)
            sums[name] = GradientSum(buffer, partial(arrived.append, name))
            attach_sum(parameter, sums[name])
    batch = MicroBatch(random_tokens(config, 2, 37), torch.tensor([True, False]))
    output: Output = run(model.phases(batch, None, Uncut()))[1]
    (total_loss(output) + 0.4 * output.device + 0.2 * output.communication).backward()
    gradients = global_gradients(model)
    assert sorted(arrived) == sorted(sums) and len(sums) > 15
    for name, gradient in expected.items():
        if name in sums:
            assert name not in gradients
            assert relative_error(sums[name].buffer - 1, gradient) < 1e-4, name
        else:
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
