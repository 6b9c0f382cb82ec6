"""Which global tensors a rank's parameters hold, and their first values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.comm.flat import FlatDispatcher
from counterflow.model.config import ModelConfig
from counterflow.model.counts import count_parameters
from counterflow.model.naming import initial_tensor, initialise, local_parameters, router_biases
from counterflow.model.transformer import Transformer
from counterflow.seeds import seed_of
from counterflow.tests.model.small import (
    build,
    global_gradients,
    global_tensors,
    random_tokens,
    small_config,
    total_loss,
)


def fresh(config: ModelConfig, experts: range | None = None, seed: int = 0) -> Transformer:
    """A model, or the part of it that holds `experts`, with its initial weights in place of NaN."""
    model = Transformer(
        config, FlatDispatcher(None, config.n_routed_experts), experts or range(config.n_routed_experts)
    )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    initialise(model, seed)
    return model


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


@pytest.mark.parametrize(
    "config",
    [
        small_config(num_nextn_predict_layers=2),
        small_config(q_lora_rank=None, n_shared_experts=0, first_k_dense_replace=0, num_nextn_predict_layers=0),
    ],
    ids=["two MTP modules", "no q_lora, no shared expert"],
)
def test_every_element_of_every_parameter_has_one_name(config: ModelConfig) -> None:
    model = build(config)
    parameters = local_parameters(model)
    assert sorted(map(id, model.parameters())) == sorted(id(item.parameter) for item in parameters)
    tensors = global_tensors(model)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
        for tensor in tensors.values():
            tensor += 1
    assert all((parameter == 1).all() for parameter in model.parameters())
    assert len(tensors) == sum(len(item.names) for item in parameters)
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(config).trained
    for item in parameters:
        assert {tensor.shape for tensor in item.tensors()} == {torch.Size(item.shape)}


def test_names_lead_to_the_weights_they_say() -> None:
    model, inner = build(small_config()), 24
    tensors, layer = global_tensors(model), model.layers["1"].mlp
    for expert in range(8):
        name = f"layers.1.mlp.experts.{expert}"
        assert tensors[f"{name}.w1"].data_ptr() == layer.experts.gate_up.weight[expert, :inner].data_ptr()
        assert tensors[f"{name}.w3"].data_ptr() == layer.experts.gate_up.weight[expert, inner:].data_ptr()
        assert tensors[f"{name}.w2"].data_ptr() == layer.experts.down.weight[expert].data_ptr()
        assert tensors[f"{name}.w1"].shape == (inner, 40) and tensors[f"{name}.w2"].shape == (40, inner)
    assert torch.equal(tensors["layers.1.mlp.shared.w3"], layer.shared.gate_up.weight[2 * inner :])
    assert torch.equal(tensors["layers.0.mlp.w1"], model.layers["0"].mlp.gate_up.weight[:56])
    assert torch.equal(tensors["mtp.0.block.attention.q_norm"], model.mtp[0].block.attention.q_norm.gain)
    assert torch.equal(tensors["embedding"], model.embedding) and torch.equal(tensors["head"], model.head)


def test_gradients_are_named_like_their_parameters() -> None:
    model = build(small_config())
    total_loss(model(random_tokens(model.config, 2, 30))).backward()
    gradients = global_gradients(model)
    experts = model.layers["2"].mlp.experts
    assert torch.equal(gradients["layers.2.mlp.experts.3.w3"], experts.gate_up.weight.grad[3, 24:])
    for name, tensor in global_tensors(model).items():
        assert gradients[name].shape == tensor.shape


def test_experts_are_replicated_over_edp_and_the_rest_over_dp() -> None:
    for item in local_parameters(build(small_config())):
        assert item.replicas == ("edp" if any(map(is_expert, item.names)) else "dp")
        assert all(map(is_expert, item.names)) or not any(map(is_expert, item.names))


def test_ranks_of_an_expert_parallel_group_hold_the_whole_model_with_the_same_first_values() -> None:
    config = small_config()
    whole = global_tensors(fresh(config))
    halves = [global_tensors(fresh(config, experts)) for experts in (range(4), range(4, 8))]
    assert halves[0].keys() | halves[1].keys() == whole.keys()
    assert halves[0].keys() & halves[1].keys() == {name for name in whole if not is_expert(name)}
    for half in halves:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in half.items())


def test_a_ranks_experts_may_be_any_in_any_order() -> None:
    config = small_config()
    whole = global_tensors(fresh(config))
    model = Transformer(config, FlatDispatcher(None, 8), [6, 1])
    initialise(model, 0)
    assert torch.equal(model.layers["1"].mlp.experts.down.weight[0], whole["layers.1.mlp.experts.6.w2"])
    assert torch.equal(model.layers["1"].mlp.experts.down.weight[1], whole["layers.1.mlp.experts.1.w2"])


def test_first_values_depend_on_seed_and_name_alone() -> None:
    base = global_tensors(fresh(small_config()))
    deeper = global_tensors(fresh(small_config(num_hidden_layers=5, n_shared_experts=1, num_nextn_predict_layers=2)))
    same = [name for name in base if name in deeper and base[name].shape == deeper[name].shape]
    assert len(same) > 60 and all(torch.equal(base[name], deeper[name]) for name in same)
    other = global_tensors(fresh(small_config(), seed=1))
    assert not any(torch.equal(base[name], other[name]) for name in base if base[name].dim() > 1)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fresh(small_config())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_weights_start_normal_with_the_configured_deviation_and_gains_at_one(std: float) -> None:
    config = small_config(hidden_size=160, initializer_range=std)
    model = fresh(config)
    matrices: list[Tensor] = []
    for name, tensor in global_tensors(model).items():
        if tensor.dim() == 1:
            assert name.endswith("norm") and (tensor == 1).all()
        else:
            matrices.append(tensor.flatten())
            assert tensor.std().item() == pytest.approx(std, rel=5 * (2 * tensor.numel()) ** -0.5)
    everything = torch.cat(matrices).double()
    assert everything.std().item() == pytest.approx(std, rel=0.005)
    assert abs(everything.mean().item()) < 5 * std * everything.numel() ** -0.5
    assert ((everything / std) ** 4).mean().item() == pytest.approx(3.0, rel=0.02)  # of a normal distribution
    assert everything.unique().numel() > 0.95 * everything.numel()  # no tensor is another's copy
    assert all(not bias.any() for bias in router_biases(model).values())


def test_seeds_are_the_same_on_every_machine_and_in_every_process() -> None:
    assert seed_of("initial weight", 0, "head") == 1426198696577094196
    assert seed_of("a", 1) != seed_of("a", 2) and 0 <= seed_of("a") < 2**63
    assert initial_tensor("head", (2, 2), 1.0, 0).flatten().tolist() == pytest.approx(
        [0.27151698, 0.46664909, 0.43089607, 0.63699836], abs=1e-6
    )


def test_router_biases_are_those_of_the_routers_in_order() -> None:
    model = build(small_config(num_nextn_predict_layers=2))
    biases = router_biases(model)
    assert list(biases) == [
        f"{block}.mlp.gate.bias" for block in ("layers.1", "layers.2", "mtp.0.block", "mtp.1.block")
    ]
    assert all(router.bias is bias for router, bias in zip(model.routers(), biases.values(), strict=True))
