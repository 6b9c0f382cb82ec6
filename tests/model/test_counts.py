"""Parameter and FLOP counts against transformers' model and torch's own FLOP counter."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from counterflow.model.config import ModelConfig
from counterflow.model.counts import count_parameters, flops_per_token, parameter_table

V3 = ModelConfig()  # the defaults are the 671B model


def random_model(seed: int, **fixed: Any) -> ModelConfig:
    """Small model with independently drawn widths, so that a swap of two widths shows."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    experts = groups * draw.choice([2, 3])
    topk_group = draw.randint(1, groups)
    layers = draw.randint(1, 4)
    values: dict[str, Any] = {
        "vocab_size": draw.randint(50, 90),
        "hidden_size": 8 * draw.randint(3, 9),
        "intermediate_size": draw.randint(20, 99),
        "moe_intermediate_size": draw.randint(5, 40),
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw.randint(0, layers),
        "num_attention_heads": draw.randint(1, 5),
        "q_lora_rank": draw.choice([None, draw.randint(5, 30)]),
        "kv_lora_rank": draw.randint(5, 30),
        "qk_nope_head_dim": draw.randint(3, 20),
        "qk_rope_head_dim": 2 * draw.randint(1, 8),
        "v_head_dim": draw.randint(3, 20),
        "n_routed_experts": experts,
        "n_shared_experts": draw.randint(1, 3),
        "num_experts_per_tok": draw.randint(1, experts // groups * topk_group),
        "n_group": groups,
        "topk_group": topk_group,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**values, **fixed})


def transformers_model(model: ModelConfig, device: str = "cpu") -> DeepseekV3ForCausalLM:
    values = model.model_dump(exclude={"rope_scaling", "num_nextn_predict_layers"})
    config = DeepseekV3Config(
        **values,
        num_key_value_heads=model.num_attention_heads,
        rope_interleave=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.device(device):
        return DeepseekV3ForCausalLM(config)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def idle_experts_of(network: DeepseekV3ForCausalLM, model: ModelConfig) -> int:
    """Number of parameters of experts that a token does not use, from the shapes of transformers' stacked experts."""
    idle = 0
    for layer in network.model.layers:
        if hasattr(layer.mlp, "experts"):
            one = parameters_of(layer.mlp.experts) // model.n_routed_experts
            idle += one * (model.n_routed_experts - model.num_experts_per_tok)
    return idle


@pytest.mark.parametrize("seed", range(12))
def test_total_and_active_parameters_equal_transformers(seed: int) -> None:
    model = random_model(seed)
    network = transformers_model(model, device="meta")
    counts = count_parameters(model)
    assert counts.total == parameters_of(network)
    assert counts.active == parameters_of(network) - idle_experts_of(network, model)
    assert counts.trained == counts.total


def test_671b_parameters_equal_transformers_and_the_published_sizes() -> None:
    network = transformers_model(V3, device="meta")
    counts = count_parameters(V3)
    assert counts.total == parameters_of(network)
    assert counts.active == parameters_of(network) - idle_experts_of(network, V3)
    assert round(counts.total / 1e9, 3) == 671.026
    assert round(counts.active / 1e9, 2) == 37.55


def test_router_bias_is_a_buffer_in_transformers_and_outside_every_total() -> None:
    network = transformers_model(V3, device="meta")
    biases = sum(buffer.numel() for name, buffer in network.named_buffers() if "correction_bias" in name)
    counts = count_parameters(V3)
    assert biases == counts.moe_layers * counts.router_bias == 14_848
    assert round((counts.total + biases) / 1e9, 3) == 671.026  # so the published figure fits both


@pytest.mark.parametrize("seed", range(4))
def test_mtp_module_is_one_moe_block_with_its_projection_and_three_norms(seed: int) -> None:
    model = random_model(seed, num_nextn_predict_layers=2)
    deeper = model.model_copy(update={"num_hidden_layers": model.num_hidden_layers + 1})
    block = parameters_of(transformers_model(deeper, "meta").model.layers[-1])
    hidden = model.hidden_size
    with torch.device("meta"):
        extra = nn.ModuleList([nn.Linear(2 * hidden, hidden, bias=False), *(nn.RMSNorm(hidden) for _ in range(3))])
    counts = count_parameters(model)
    assert counts.mtp_module == block + parameters_of(extra)
    assert counts.trained - counts.total == 2 * counts.mtp_module


def test_671b_mtp_module_has_11_61_billion_parameters() -> None:
    assert round(count_parameters(V3).mtp_module / 1e9, 2) == 11.61


@pytest.mark.parametrize("model", [V3, *(random_model(seed, num_nextn_predict_layers=seed % 3) for seed in range(6))])
def test_table_rows_add_up_to_the_totals(model: ModelConfig) -> None:
    rows, counts = parameter_table(model), count_parameters(model)
    assert sum(row.total for row in rows) == counts.trained
    assert all(row.total == row.each * row.copies for row in rows)
    main = [row for row in rows if row.part != "MTP module"]
    assert sum(row.active for row in main) == counts.active
    assert len(rows) - len(main) == (counts.mtp_modules > 0)


def measured_flops(model: ModelConfig, sequences: int, length: int) -> tuple[int, int]:
    """FLOPs of transformers' forward, and of forward and backward, by torch's counter (2 per multiply-add).

    Eager attention multiplies whole S x S matrices, masked or not, which is the convention under test.
    """
    network = transformers_model(model)
    tokens = torch.randint(model.vocab_size, (sequences, length))
    with FlopCounterMode(display=False) as counter:
        logits = network(tokens, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("seed", range(8))
def test_training_flops_equal_those_torch_counts_in_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    model, sequences, length = random_model(seed), 2, 7 + seed
    forward, training = measured_flops(model, sequences, length)
    expected = flops_per_token(model, length) * sequences * length
    assert training == expected
    assert 3 * forward == expected


@pytest.mark.parametrize("seed", range(3))
def test_each_mtp_module_costs_a_block_a_projection_and_a_head(seed: int) -> None:
    model, length = random_model(seed, first_k_dense_replace=0), 9
    deeper = model.model_copy(update={"num_hidden_layers": model.num_hidden_layers + 1})
    block = measured_flops(deeper, 1, length)[1] - measured_flops(model, 1, length)[1]
    hidden = model.hidden_size
    module = block / length + 6 * (2 * hidden * hidden + hidden * model.vocab_size)
    for depth in (1, 2):
        trained = model.model_copy(update={"num_nextn_predict_layers": depth})
        added = flops_per_token(trained, length) - flops_per_token(model, length)
        assert added == pytest.approx(depth * module, rel=1e-12)


def test_counting_the_671b_model_does_not_import_torch() -> None:
    program = (
        "import sys; from counterflow.model.config import ModelConfig; from counterflow.model.counts import "
        "count_parameters, flops_per_token; count_parameters(ModelConfig()); flops_per_token(ModelConfig(), 4096); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
