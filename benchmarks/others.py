"""Training steps of other implementations of DeepSeek-V3's architecture, for benchmarks to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# transformers' other choices are far slower on a CPU (batched_mm copies an expert per token) or need a GPU.
TRANSFORMERS = (("sdpa", "grouped_mm"), ("eager", "grouped_mm"), ("eager", "eager"))


def transformers_step(
    architecture: dict[str, Any], tokens: Tensor, dtype: torch.dtype, attention: str, experts: str
) -> Callable[[], None]:
    """Forward and backward of transformers' `DeepseekV3ForCausalLM`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **architecture,
        num_key_value_heads=architecture["num_attention_heads"],
        attn_implementation=attention,
        experts_implementation=experts,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    inputs = tokens[:, :-1]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs, labels=inputs, use_cache=False).loss.backward()

    return step


def torchtitan_step(architecture: dict[str, Any], tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of torchtitan's `DeepSeekV3Model`, with SDPA for its attention.

    Checked with 0.3.0. torchtitan's own masked attentions need a compiler or a GPU. Raises ImportError where
    torchtitan, or a package that it imports, is missing.
    """
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model, build_mla_moe_layers

    given, normal = architecture, {"weight": torch.nn.init.normal_}
    hidden, vocabulary = given["hidden_size"], given["vocab_size"]

    def init(_: int) -> dict[str, Callable[..., Any]]:
        return normal

    layers = build_mla_moe_layers(
        n_layers=given["num_hidden_layers"],
        n_dense_layers=given["first_k_dense_replace"],
        dim=hidden,
        n_heads=given["num_attention_heads"],
        q_lora_rank=given["q_lora_rank"],
        kv_lora_rank=given["kv_lora_rank"],
        qk_nope_head_dim=given["qk_nope_head_dim"],
        qk_rope_head_dim=given["qk_rope_head_dim"],
        v_head_dim=given["v_head_dim"],
        mscale=1.0,
        dense_hidden_dim=given["intermediate_size"],
        moe_hidden_dim=given["moe_intermediate_size"],
        num_experts=given["n_routed_experts"],
        num_shared_experts=given["n_shared_experts"],
        router_top_k=given["num_experts_per_tok"],
        router_score_func="sigmoid",
        router_num_expert_groups=given["n_group"],
        router_num_limited_groups=given["topk_group"],
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=normal,
        norm_init={"weight": torch.nn.init.ones_},
        depth_init=init,
        depth_experts_init=init,
        rope=ComplexRoPE.Config(dim=given["qk_rope_head_dim"], max_seq_len=given["max_position_embeddings"]),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config = DeepSeekV3Model.Config(
        vocab_size=vocabulary,
        dim=hidden,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=hidden),
        norm=RMSNorm.Config(normalized_shape=hidden),
        lm_head=Linear.Config(in_features=hidden, out_features=vocabulary),
        layers=layers,
        mtp_layers=[],
    )
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    for parameter in model.train().parameters():
        parameter.data = parameter.data.to(dtype)  # buffers hold complex numbers
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(inputs, positions)
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()

    return step
