"""Gradients of a pipeline's pass that go to an optimizer's sums: every parameter's, none through autograd."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.model import kernels as kernels_module
from counterflow.model.kernels import add_rows_of_tokens
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import LossWeights, MicroBatch
from counterflow.phases import Tape, run
from counterflow.tests.model.small import build, random_tokens, relative_error, small_config, total_loss
from counterflow.weight_gradients import GradientSum, attach_sum, drain


class Sums:
    """Sums of all parameters of a model, with the number of gradients that each of them got."""

    def __init__(self, model: nn.Module) -> None:
        self.told = {name: 0 for name, _ in model.named_parameters()}
        self.of = {parameter: self._sum(name, parameter) for name, parameter in model.named_parameters()}
        for parameter, total in self.of.items():
            attach_sum(parameter, total)
        for module in model.modules():
            if isinstance(module, Linear | GroupedLinear):
                module.gradients = self

    def _sum(self, name: str, parameter: nn.Parameter) -> GradientSum:
        def arrived() -> None:
            self.told[name] += 1

        return GradientSum(torch.zeros_like(parameter, dtype=torch.float32), arrived)

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.of[parameter].buffer

    def arrived(self, parameter: nn.Parameter) -> None:
        self.of[parameter].arrived()


@pytest.mark.parametrize("policy", ["none", "v3", "full"])
@pytest.mark.parametrize("branch", ["cpu", "gpu"])
def test_every_gradient_of_a_pass_goes_to_a_sum(
    branch: str, policy: RecomputePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    if branch == "gpu":
        monkeypatch.setattr(kernels_module, "on_gpu", lambda _: True)
    config = small_config(num_nextn_predict_layers=1)
    tokens, valid = random_tokens(config, 2, 37), torch.tensor([True, False])
    plain = build(config, recompute=policy)
    total_loss(plain(tokens, valid)).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    model = build(config, recompute=policy)
    sums, tape, later = Sums(model), Tape(), deque[Callable[[], None]]()
    run(model.phases(MicroBatch(tokens, valid, LossWeights(1.0, 0.3, 0.5)), None, tape))
    run(tape.backward(None, model.weight_queue, later))
    drain(later)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        gradient = expected[name]
        assert gradient is not None and relative_error(sums.of[parameter].buffer, gradient) < 2e-5, name
    twice = {"head", "embedding"}  # by the model and by its MTP module
    assert sums.told == {name: 2 if name in twice else 1 for name in sums.told}


def test_plain_autograd_of_a_model_with_sums_has_all_gradients() -> None:
    config = small_config()
    tokens = random_tokens(config, 1, 9)
    model = build(config)
    sums = Sums(model)
    total_loss(model(tokens)).backward()
    assert not any(sums.told.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("vocabulary", [1, 5, 400])
def test_rows_of_tokens_are_added_each_token_once(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    tokens = torch.randint(vocabulary, (70,), generator=generator)
    rows = torch.randn(70, 6, generator=generator).bfloat16()
    total = torch.randn(vocabulary, 6, generator=generator)
    expected = total.double().index_add_(0, tokens, rows.double())
    untouched = torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, tokens, False)
    before = total.clone()
    add_rows_of_tokens(total, tokens, rows)
    assert torch.allclose(total.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(total[untouched], before[untouched])
