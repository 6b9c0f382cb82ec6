"""The table between our names and Hugging Face's."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.checkpoint.hf_names import from_hugging_face, shared_copies, to_hugging_face
from counterflow.comm.flat import FlatDispatcher
from counterflow.model.config import ModelConfig
from counterflow.model.naming import local_parameters, router_biases
from counterflow.model.transformer import Transformer

LAYERS, DENSE, EXPERTS = 61, 3, 256


def names_of(config: ModelConfig) -> list[str]:
    """Every global tensor of a model: parameters and router biases."""
    with torch.device("meta"):
        model = Transformer(config, FlatDispatcher(None, config.n_routed_experts), range(config.n_routed_experts))
    return [name for item in local_parameters(model) for name in item.names] + list(router_biases(model))


def block_names(layer: int, experts: int) -> list[str]:
    """What DeepSeek's files hold for a block of the 671B model, written out."""
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    projections = ["gate_proj", "up_proj", "down_proj"]
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{name}.weight" for name in attention]
    if experts:
        names += ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
        names += [f"mlp.shared_experts.{name}.weight" for name in projections]
        names += [f"mlp.experts.{i}.{name}.weight" for i, name in itertools.product(range(experts), projections)]
    else:
        names += [f"mlp.{name}.weight" for name in projections]
    return [f"model.layers.{layer}.{name}" for name in names]


def deepseek_names(mtp_depth: int = 1) -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(LAYERS):
        names += block_names(layer, 0 if layer < DENSE else EXPERTS)
    for layer in range(LAYERS, LAYERS + mtp_depth):
        names += block_names(layer, EXPERTS)
        names += [f"model.layers.{layer}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")]
    return names


@pytest.mark.parametrize("mtp_depth", [0, 1, 2])
def test_671b_names_map_one_to_one_onto_deepseeks_files(mtp_depth: int) -> None:
    ours = names_of(ModelConfig(num_nextn_predict_layers=mtp_depth))
    theirs = [to_hugging_face(name, LAYERS) for name in ours]
    assert len(set(ours)) == len(ours)
    assert sorted(theirs) == sorted(deepseek_names(mtp_depth))
    assert [from_hugging_face(name, LAYERS) for name in theirs] == ours


def test_direct_queries_have_a_name() -> None:
    ours = names_of(ModelConfig(q_lora_rank=None, num_hidden_layers=2, first_k_dense_replace=1))
    assert "layers.0.attention.q_proj" in ours
    assert to_hugging_face("layers.0.attention.q_proj", 2) == "model.layers.0.self_attn.q_proj.weight"
    assert [from_hugging_face(to_hugging_face(name, 2), 2) for name in ours] == ours


def test_shared_copies_are_the_mtp_modules_embedding_and_head() -> None:
    assert shared_copies(LAYERS, 1) == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }
    assert len(shared_copies(LAYERS, 3)) == 6 and not shared_copies(LAYERS, 0)
    for copy, original in shared_copies(LAYERS, 2).items():
        assert copy not in deepseek_names(2) and original in deepseek_names(2)
        with pytest.raises(KeyError):
            from_hugging_face(copy, LAYERS)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "norm.weight",
        "embedding.weight",
        "layers.3",
        "layers.3.",
        "layers.x.mlp_norm",
        "layers.03.mlp_norm",
        "layers.61.mlp_norm",  # their layer 61 is the first MTP module
        "layers.3.block.mlp_norm",
        "layers.3.project",
        "layers.3.mlp.experts.w1",
        "layers.3.mlp.experts.07.w1",
        "layers.3.mlp.experts.7.w4",
        "layers.3.mlp.experts.7.gate_proj.weight",
        "layers.3.mlp.experts.{}.w1",
        "mtp.0.mlp_norm",
        "mtp.0.block.norm",
        "mtp.0.block.block.mlp_norm",
        "model.layers.3.input_layernorm.weight",
    ],
)
def test_a_name_that_is_not_ours_is_a_key_error(name: str) -> None:
    with pytest.raises(KeyError):
        to_hugging_face(name, LAYERS)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers",
        "model.norm",
        "model.norm.bias",
        "layers.3.input_layernorm.weight",
        "model.mtp.3.input_layernorm.weight",
        "model.layers.3.enorm.weight",  # only MTP modules have it
        "model.layers.3.self_attn.q_a_proj.bias",
        "model.layers.3.self_attn.q_a_proj.weight_scale_inv",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.07.gate_proj.weight",
        "model.layers.3.mlp.experts.7.w1",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.٣.input_layernorm.weight",
        "lm_head.weight ",
    ],
)
def test_a_name_that_is_not_theirs_is_a_key_error(name: str) -> None:
    with pytest.raises(KeyError):
        from_hugging_face(name, LAYERS)


pieces = st.sampled_from(
    re.findall(
        r"\S+",
        "model layers mtp norm weight mlp experts gate gate_proj up_proj w1 w2 bias block project self_attn q_a_proj "
        "enorm e_score_correction_bias 0 3 07 60 61 62 {}",
    )
)


@settings(deadline=None)
@given(st.lists(pieces, min_size=1, max_size=7).map(".".join))
def test_what_either_side_accepts_comes_back_as_it_was(name: str) -> None:
    for there, back in ((to_hugging_face, from_hugging_face), (from_hugging_face, to_hugging_face)):
        try:
            translated = there(name, LAYERS)
        except KeyError:
            continue
        assert back(translated, LAYERS) == name
