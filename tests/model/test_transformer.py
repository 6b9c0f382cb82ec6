"""Whole network, multi-token prediction included, against the literal reference of `reference.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.model.config import ModelConfig
from counterflow.model.naming import router_biases
from counterflow.model.transformer import Output, Transformer
from counterflow.tests.model import reference
from counterflow.tests.model.small import (
    build,
    global_gradients,
    global_tensors,
    random_config,
    random_tokens,
    relative_error,
    small_config,
    total_loss,
)

CONFIGS = {
    "depth 0": small_config(num_nextn_predict_layers=0),
    "depth 1": small_config(),
    "depth 2": small_config(num_nextn_predict_layers=2, q_lora_rank=None, norm_topk_prob=False),
    "no shared expert": small_config(n_shared_experts=0, n_group=1, topk_group=1, first_k_dense_replace=0),
    "random": random_config(3, num_nextn_predict_layers=1),
}


def weights_of(model: Transformer) -> reference.LossWeights:
    """FP64 copies with which the reference can compute gradients."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in global_tensors(model).items()}
    return weights | {name: bias.double() for name, bias in router_biases(model).items()}


def reference_loss(result: reference.Reference, mtp_weight: float = 0.3, balance_weight: float = 0.5) -> Tensor:
    return result.loss + mtp_weight * sum(result.mtp_losses) + balance_weight * result.balance


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_losses_counts_and_gradients_equal_the_reference(config: ModelConfig) -> None:
    model, tokens, valid = build(config), random_tokens(config, 3, 11), torch.tensor([True, False, True])
    weights = weights_of(model)
    expected = reference.run(config, weights, tokens, valid.tolist())
    output = model(tokens, valid)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert [loss.item() for loss in output.mtp_losses] == pytest.approx(
        [x.item() for x in expected.mtp_losses], rel=1e-6
    )
    assert output.balance.item() == pytest.approx(expected.balance.item(), rel=1e-6)
    assert output.counts.tolist() == expected.counts

    total_loss(output).backward()
    reference_loss(expected).backward()
    gradients = global_gradients(model)
    assert gradients.keys() == global_tensors(model).keys()
    for name, gradient in gradients.items():
        wanted = weights[name].grad
        wanted = torch.zeros_like(weights[name]) if wanted is None else wanted  # an expert that no token chose
        assert relative_error(gradient, wanted) < 1e-5, name


def test_embedding_and_head_get_the_sum_of_the_gradients_of_all_their_uses() -> None:
    config = small_config(num_nextn_predict_layers=2)
    model, tokens = build(config), random_tokens(config, 2, 9)
    weights = weights_of(model)
    uses = {name: [name, f"{name}@1", f"{name}@2"] for name in ("embedding", "head")}
    for name, copies in uses.items():
        weights |= {copy: weights[name].detach().clone().requires_grad_() for copy in copies}
    reference_loss(reference.run(config, weights, tokens, [True, True]), balance_weight=0.0).backward()
    total_loss(model(tokens), balance_weight=0.0).backward()
    gradients = global_gradients(model)
    for name, copies in uses.items():
        parts = [weights[copy].grad for copy in copies]
        assert all(part is not None and part.norm() > 0.01 * gradients[name].norm() for part in parts)
        assert relative_error(gradients[name], sum(part for part in parts if part is not None)) < 1e-5


def gradients_with(config: ModelConfig, tokens: Tensor, mtp_weight: float) -> dict[str, Tensor]:
    model = build(config)
    total_loss(model(tokens), mtp_weight).backward()
    return global_gradients(model)


def test_mtp_weight_scales_its_gradient_linearly() -> None:
    config = small_config(num_nextn_predict_layers=2)
    tokens = random_tokens(config, 2, 30)
    without, once, thrice = (gradients_with(config, tokens, weight) for weight in (0.0, 0.1, 0.3))
    for name, gradient in without.items():
        added = once[name] - gradient
        assert added.any() or not thrice[name].any(), name  # an expert that no token chose has no gradient at all
        assert relative_error(gradient + 3 * added, thrice[name]) < 1e-5, name


def test_mtp_module_of_weight_zero_leaves_no_trace_in_the_main_model() -> None:
    config = small_config(num_nextn_predict_layers=0)
    deep = small_config(num_nextn_predict_layers=1)
    tokens = random_tokens(deep, 2, 30)
    model, plain = build(deep), build(config)
    output, expected = model(tokens), plain(tokens[:, :-1])
    assert torch.equal(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    gradients = global_gradients(model)
    for name, gradient in global_gradients(plain).items():
        assert torch.equal(gradients[name], gradient), name


def test_padded_sequences_change_nothing() -> None:
    config = small_config()
    tokens = random_tokens(config, 4, 20)
    valid = torch.tensor([True, False, True, False])
    model, smaller = build(config), build(config)
    padded, unpadded = model(tokens, valid), smaller(tokens[valid])
    assert_same_sums(padded, [unpadded])
    total_loss(padded).backward()
    total_loss(unpadded).backward()
    gradients = global_gradients(model)
    for name, gradient in global_gradients(smaller).items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_micro_batches_add_up_to_the_batch(sizes: tuple[int, ...]) -> None:
    config = small_config()
    tokens = random_tokens(config, 4, 20)
    whole, parts = build(config), build(config)
    output = whole(tokens)
    total_loss(output).backward()
    outputs = [parts(piece) for piece in tokens.split(sizes)]
    for part in outputs:
        total_loss(part).backward()
    assert_same_sums(output, outputs)
    gradients = global_gradients(parts)
    for name, gradient in global_gradients(whole).items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


def assert_same_sums(whole: Output, parts: list[Output]) -> None:
    """Check that every sum of `whole` is the sum over `parts`."""
    for name in ("loss", "balance"):
        assert getattr(whole, name).item() == pytest.approx(sum(getattr(part, name).item() for part in parts), rel=1e-6)
    for depth, loss in enumerate(whole.mtp_losses):
        assert loss.item() == pytest.approx(sum(part.mtp_losses[depth].item() for part in parts), rel=1e-6)
    assert torch.equal(whole.counts, torch.stack([part.counts for part in parts]).sum(0))


def test_logits_are_those_of_the_loss() -> None:
    config = small_config(num_nextn_predict_layers=0)
    model, tokens = build(config).eval(), random_tokens(config, 2, 140)
    with torch.no_grad():
        logits = model.logits(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        assert model(tokens).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_token_does_not_depend_on_later_tokens() -> None:
    config = small_config(num_nextn_predict_layers=0)
    model, tokens = build(config).eval(), random_tokens(config, 1, 150)
    changed = tokens.clone()
    changed[:, 131:] = (changed[:, 131:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.allclose(before[:, :131], after[:, :131], atol=1e-5)
    assert not torch.allclose(before[:, 131:], after[:, 131:], atol=1e-2)


def test_a_model_without_experts_reports_no_counts() -> None:
    config = small_config(first_k_dense_replace=3, num_nextn_predict_layers=0)
    output = build(config)(random_tokens(config, 2, 5))
    assert output.counts.shape == (0, config.n_routed_experts)
    assert output.balance.item() == 0.0


def test_evaluating_first_does_not_disturb_training() -> None:
    config = small_config()
    tokens = random_tokens(config, 2, 20)
    model, fresh = build(config), build(config)
    with torch.inference_mode():
        model(random_tokens(config, 2, 40))
    for each in (model, fresh):
        total_loss(each(tokens)).backward()
    gradients = global_gradients(model)
    for name, gradient in global_gradients(fresh).items():
        assert torch.equal(gradients[name], gradient), name


def test_rows_of_the_counts_are_the_routers_in_order() -> None:
    config = small_config(num_nextn_predict_layers=2)
    model, tokens = build(config), random_tokens(config, 2, 10)
    for expert, router in enumerate(model.routers()):
        router.bias[expert] = 100.0  # every token selects it
    counts = model(tokens).counts
    assert counts.shape == (4, config.n_routed_experts)
    assert counts.diagonal().tolist() == [20, 20, 20, 20]
    assert counts.sum(1).tolist() == [20 * config.num_experts_per_tok] * 4


@pytest.mark.parametrize("depth", [0, 2])
def test_bf16_weights_and_activations_give_nearly_the_same_losses_and_gradients(depth: int) -> None:
    # One group and all experts: a token whose choice changes by rounding would hide every other difference.
    config = small_config(num_nextn_predict_layers=depth, n_group=1, topk_group=1, num_experts_per_tok=8)
    tokens = random_tokens(config, 2, 140)
    exact, model = build(config), build(config, dtype=torch.bfloat16)
    expected, output = exact(tokens), model(tokens)
    assert output.loss.dtype == output.balance.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.005)
    assert [x.item() for x in output.mtp_losses] == pytest.approx([x.item() for x in expected.mtp_losses], rel=0.005)
    total_loss(expected).backward()
    total_loss(output).backward()
    gradients = global_gradients(model)
    for name, gradient in global_gradients(exact).items():
        assert gradients[name].dtype == torch.bfloat16
        print(f"{name}: {relative_error(gradients[name], gradient):.3f}")
        assert relative_error(gradients[name], gradient) < 0.06, name
