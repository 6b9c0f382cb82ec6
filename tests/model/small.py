"""Small models with weights of ordinary size, and their tensors by global name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterflow.comm.flat import FlatDispatcher
from counterflow.fp8.recipe import Recipe
from counterflow.model.config import ModelConfig, RopeScaling
from counterflow.model.kernels import Kernels
from counterflow.model.naming import local_parameters, router_biases
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import Output, Part, Transformer
from counterflow.seeds import seed_of


def random_config(seed: int, **fixed: Any) -> ModelConfig:
    """Small model with independently drawn widths, so that a swap of two widths shows."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    group_size = draw.choice([2, 3, 4])
    topk_group = draw.randint(1, groups)
    top_k = draw.randint(1, group_size * topk_group)
    layers = draw.randint(2, 3)
    values: dict[str, Any] = {
        "vocab_size": draw.randint(50, 90),
        "hidden_size": 8 * draw.randint(3, 9),
        "intermediate_size": 8 * draw.randint(3, 12),
        "moe_intermediate_size": 8 * draw.randint(1, 5),
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw.randint(0, layers - 1),
        "num_attention_heads": draw.randint(1, 5),
        "q_lora_rank": draw.choice([None, draw.randint(5, 30)]),
        "kv_lora_rank": draw.randint(5, 30),
        "qk_nope_head_dim": draw.randint(3, 20),
        "qk_rope_head_dim": 2 * draw.randint(1, 8),
        "v_head_dim": draw.randint(3, 20),
        "n_routed_experts": groups * group_size,
        "n_shared_experts": draw.randint(1, 3),
        "num_experts_per_tok": top_k,
        "n_group": groups,
        "topk_group": topk_group,
        # A single gate weight, normalised, is constant: its gradient is zero except for rounding.
        "norm_topk_prob": top_k > 1 and draw.random() < 0.7,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 1024,
        "rope_theta": draw.choice([100.0, 10000.0]),
    }
    return ModelConfig(**{**values, **fixed})


def small_config(**changes: Any) -> ModelConfig:
    """Three layers, one of them dense, with all parts of V3."""
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 3,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 512,
    }
    return ModelConfig(**{**values, **changes})


def yarn(**changes: Any) -> RopeScaling:
    """YaRN from a context of 64, so that short sequences have kept, blended and stretched frequencies."""
    return RopeScaling(**{"original_max_position_embeddings": 64, "beta_fast": 8.0, **changes})


def build(
    config: ModelConfig,
    seed: int = 0,
    recompute: RecomputePolicy = "none",
    experts: Sequence[int] | None = None,
    kernels: Kernels | None = None,
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
    part: Part | None = None,
) -> Transformer:
    """Model, or a part of it, in this process alone. Weights, gains and router biases are random by the seed only.

    The biases are FP32 whatever the weights' `dtype`.
    """
    dispatcher = FlatDispatcher(None, config.n_routed_experts)
    model = Transformer(config, dispatcher, experts or range(config.n_routed_experts), recompute, kernels, part, recipe)
    with torch.no_grad():
        for name, tensor in (global_tensors(model) | router_biases(model)).items():
            tensor.copy_(_random_tensor(name, tensor.shape, seed))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _random_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed_of("test", seed, name)))
    if name.endswith("gate.bias"):
        return 0.2 * value
    if len(shape) == 1:
        return 1.0 + 0.2 * value
    # Outputs have the size of the inputs, and logits are around 3: a softmax far from uniform.
    return value * (3.0 if name == "head" else 1.0) * (shape[1] ** -0.5 if name != "embedding" else 1.0)


def global_tensors(model: Transformer) -> dict[str, Tensor]:
    """Values of the parameters by global name, as views."""
    return {
        name: tensor
        for item in local_parameters(model)
        for name, tensor in zip(item.names, item.tensors(), strict=True)
    }


def global_gradients(model: Transformer) -> dict[str, Tensor]:
    """Gradients by global name; a parameter without one is left out."""
    return {
        name: gradient
        for item in local_parameters(model)
        if item.parameter.grad is not None
        for name, gradient in zip(item.names, item.tensors(item.parameter.grad), strict=True)
    }


def random_tokens(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Tokens int64 `[sequences, length + 1 + depth]`: inputs of `length` positions and their targets."""
    generator = torch.Generator().manual_seed(seed)
    width = length + 1 + config.num_nextn_predict_layers
    return torch.randint(config.vocab_size, (sequences, width), generator=generator)


def total_loss(output: Output, mtp_weight: float = 0.3, balance_weight: float = 0.5) -> Tensor:
    """Scalar that contains every loss of the output."""
    return output.loss + mtp_weight * sum(output.mtp_losses) + balance_weight * output.balance


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; 0 if both are zero."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0
