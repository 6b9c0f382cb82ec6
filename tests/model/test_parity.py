"""Model against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM with the same weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_layers as transformers_layers
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

from counterflow.checkpoint.hf_names import to_hugging_face
from counterflow.comm.flat import FlatDispatcher
from counterflow.model.config import ModelConfig, RopeScaling
from counterflow.model.naming import router_biases
from counterflow.model.rope import rotary_factors, softmax_scale
from counterflow.model.transformer import Transformer
from counterflow.tests.model.small import (
    build,
    global_gradients,
    global_tensors,
    random_config,
    random_tokens,
    relative_error,
    small_config,
    yarn,
)


def transformers_config(config: ModelConfig) -> DeepseekV3Config | DeepseekV2Config:
    values = config.model_dump(exclude={"rope_scaling", "rope_theta"})
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "yarn", **config.rope_scaling.model_dump(exclude={"type"})}
    kind = DeepseekV3Config if config.topk_method == "noaux_tc" else DeepseekV2Config
    return kind(
        **values,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        rope_interleave=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def by_expert(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """Tensors under the names of DeepSeek's files; transformers stacks the experts, and the gate and up projections."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors:
        stacked = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up|down)_proj", name)
        if tensor is None or not tensor.numel():
            continue
        if stacked is None:
            result[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = {"down_proj": weight}
            if stacked[2] == "gate_up":
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            result |= {f"{stacked[1]}.{expert}.{part}.weight": value for part, value in parts.items()}
    return result


def transformers_twin(model: Transformer) -> DeepseekV3ForCausalLM | DeepseekV2ForCausalLM:
    """Transformers' model with our weights. Every tensor of either model has one counterpart in the other."""
    layers = model.config.num_hidden_layers
    config = transformers_config(model.config)
    network = (DeepseekV3ForCausalLM if isinstance(config, DeepseekV3Config) else DeepseekV2ForCausalLM)(config)
    targets = by_expert([*network.named_parameters(), *network.named_buffers()])
    targets = {name: tensor for name, tensor in targets.items() if "inv_freq" not in name}
    sources = global_tensors(model) | router_biases(model)
    assert sorted(to_hugging_face(name, layers) for name in sources if not name.startswith("mtp.")) == sorted(targets)
    with torch.no_grad():
        for name, tensor in sources.items():
            if not name.startswith("mtp."):
                targets[to_hugging_face(name, layers)].copy_(tensor)
    return network


def assert_same_gradients(model: Transformer, expected: dict[str, Tensor]) -> None:
    """Compare the gradients of all our parameters; `expected` is by Hugging Face's names, without unused parameters."""
    gradients = global_gradients(model)
    assert gradients.keys() == global_tensors(model).keys()
    errors = {}
    for name, gradient in gradients.items():
        wanted = expected.get(to_hugging_face(name, model.config.num_hidden_layers), torch.zeros_like(gradient))
        errors[name] = relative_error(gradient, wanted)
    worst = max(errors, key=lambda name: errors[name])
    print(f"largest relative error of a gradient: {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 1e-5, worst


V2_ROUTER: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.0,
}
PLAIN: dict[str, Any] = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
CASES: dict[str, ModelConfig] = {
    **{f"seed {seed}": random_config(seed) for seed in range(6)},
    "q_lora": small_config(num_nextn_predict_layers=0),
    "no q_lora": small_config(num_nextn_predict_layers=0, q_lora_rank=None),
    "one group": small_config(num_nextn_predict_layers=0, n_group=1, topk_group=1),
    "raw scores": small_config(num_nextn_predict_layers=0, norm_topk_prob=False, routed_scaling_factor=1.0),
    "no shared expert": small_config(num_nextn_predict_layers=0, n_shared_experts=0),
    "all dense": small_config(num_nextn_predict_layers=0, first_k_dense_replace=3),
    "yarn": small_config(num_nextn_predict_layers=0, rope_scaling=yarn(factor=8.0)),
    "yarn, two mscales": small_config(
        num_nextn_predict_layers=0, rope_scaling=yarn(factor=4.0, mscale=1.0, mscale_all_dim=0.707)
    ),
    "V2": small_config(num_nextn_predict_layers=0, **V2_ROUTER, hidden_size=48),
    "V2-Lite": small_config(
        num_nextn_predict_layers=0, **V2_ROUTER | PLAIN, hidden_size=48, rope_scaling=yarn(factor=8.0)
    ),
    "yarn, wide": random_config(11, qk_rope_head_dim=32, rope_scaling=yarn(factor=40.0, mscale=0.707, beta_slow=2.0)),
}


@pytest.mark.parametrize("length", [50, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_loss_and_every_gradient_equal_transformers(config: ModelConfig, length: int) -> None:
    model, tokens = build(config, seed=length), random_tokens(config, 2, length)
    network = transformers_twin(model)
    expected = network(tokens[:, :-1], use_cache=False).logits
    with torch.no_grad():
        logits = model.logits(tokens[:, :-1])
    assert expected.abs().max() > 3  # weights large enough that an error shows
    error = (logits - expected).abs().max()
    print(f"largest difference of a logit: {error:.1e}")
    assert error < 1e-4

    loss = model(tokens).loss
    wanted = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    wanted.backward()
    assert_same_gradients(model, by_expert((name, p.grad) for name, p in network.named_parameters()))


def test_671b_tensors_have_the_shapes_of_transformers() -> None:
    config = ModelConfig(num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = Transformer(config, FlatDispatcher(None, 256), range(256))
        network = DeepseekV3ForCausalLM(transformers_config(config))
    ours = {to_hugging_face(name, 61): tensor.shape for name, tensor in global_tensors(model).items()}
    assert ours == {name: tensor.shape for name, tensor in by_expert(network.named_parameters()).items()}


def mtp_targets(modules: nn.ModuleList, layers: int, gradients: bool = False) -> dict[str, Tensor]:
    """Tensors of transformers' MTP layers under the names of DeepSeek's files."""
    tensors = {}
    for depth, module in enumerate(modules):
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            short = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            tensors[f"model.layers.{layers + depth}.{short}"] = value.grad if gradients else value
    return by_expert(tensors.items())


@pytest.mark.skipif(not hasattr(transformers_layers, "MtpLayer"), reason="this version of transformers has no MTP")
def test_mtp_equals_the_layers_that_transformers_drafts_with() -> None:
    config = small_config(num_nextn_predict_layers=2, first_k_dense_replace=0)
    model, length = build(config), 50
    layers, tokens = config.num_hidden_layers, random_tokens(config, 2, length)
    network = transformers_twin(model)
    modules = nn.ModuleList(
        transformers_layers.MtpLayer(network.config, modeling.DeepseekV3DecoderLayer, modeling.DeepseekV3RMSNorm, 0)
        for _ in model.mtp
    )
    targets = mtp_targets(modules, layers)
    sources = {name: tensor for name, tensor in global_tensors(model).items() if name.startswith("mtp.")}
    sources |= {name: bias for name, bias in router_biases(model).items() if name.startswith("mtp.")}
    assert sorted(to_hugging_face(name, layers) for name in sources) == sorted(targets)
    with torch.no_grad():
        for name, tensor in sources.items():
            targets[to_hugging_face(name, layers)].copy_(tensor)

    hidden = network.model(tokens[:, :length], use_cache=False).last_hidden_state
    positions = torch.arange(length).unsqueeze(0)
    rope = network.model.rotary_emb(hidden, positions)
    future = torch.full((length, length), -torch.inf).triu(1)[None, None]
    total = F.cross_entropy(network.lm_head(hidden).flatten(0, 1), tokens[:, 1 : length + 1].flatten(), reduction="sum")
    losses = []
    for k, module in enumerate(modules, start=1):
        embedded = network.model.embed_tokens(tokens[:, k : length + k])
        hidden = module(embedded, hidden, rope, future, positions, None)
        labels = tokens[:, k + 1 : length + k + 1].flatten()
        losses.append(F.cross_entropy(network.lm_head(hidden).flatten(0, 1), labels, reduction="sum"))
    output = model(tokens)
    assert [loss.item() for loss in output.mtp_losses] == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    (output.loss + 0.3 * sum(output.mtp_losses)).backward()
    (total + 0.3 * sum(losses)).backward()
    gradients = by_expert((name, p.grad) for name, p in network.named_parameters())
    assert_same_gradients(model, gradients | mtp_targets(modules, layers, gradients=True))


ROPES: dict[str, ModelConfig] = {
    "671B": ModelConfig(),
    "671B at 128K": ModelConfig(rope_scaling=RopeScaling()),
    "V2-Lite's coefficients": ModelConfig(rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707)),
    "two coefficients": ModelConfig(rope_scaling=RopeScaling(factor=10.0, mscale=1.0, mscale_all_dim=0.5)),
    "no change": ModelConfig(rope_scaling=RopeScaling(factor=1.0)),
    "other base": ModelConfig(rope_theta=50000.0, qk_rope_head_dim=32, rope_scaling=RopeScaling(beta_fast=16.0)),
}


@pytest.mark.parametrize("config", ROPES.values(), ids=ROPES.keys())
def test_rotary_factors_and_softmax_scale_equal_transformers(config: ModelConfig) -> None:
    length = 4096
    expected = transformers_config(config)
    rotary = modeling.DeepseekV3RotaryEmbedding(expected)
    cos, sin = rotary(torch.empty(1, dtype=torch.float32), torch.arange(length).unsqueeze(0))
    half = config.qk_rope_head_dim // 2
    rotary = rotary_factors(config, length)
    assert rotary.shape == (length, half)
    # An angle of 4,096 is known to 2e-4 in FP32.
    assert torch.allclose(rotary.real, cos[0, :, :half], atol=5e-4)
    assert torch.allclose(rotary.imag, sin[0, :, :half], atol=5e-4)
    with torch.device("meta"):
        attention = modeling.DeepseekV3Attention(expected, 0)
    assert softmax_scale(config) == pytest.approx(attention.scaling, rel=1e-12)
