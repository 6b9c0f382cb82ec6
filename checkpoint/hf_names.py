"""Table of our names of global tensors and Hugging Face's DeepSeek-V3 names, for both directions.

The table leaves out only the MTP modules' copies of the embedding and of the output head: Hugging Face's files repeat
these tensors, and our models share them (`shared_copies`).
"""

from __future__ import annotations

import re

_BLOCK = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attention.q_proj": "self_attn.q_proj.weight",
    "attention.q_down": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "mlp.gate": "mlp.gate.weight",
    "mlp.gate.bias": "mlp.gate.e_score_correction_bias",
    "mlp.w1": "mlp.gate_proj.weight",
    "mlp.w2": "mlp.down_proj.weight",
    "mlp.w3": "mlp.up_proj.weight",
    "mlp.shared.w1": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared.w2": "mlp.shared_experts.down_proj.weight",
    "mlp.shared.w3": "mlp.shared_experts.up_proj.weight",
}
_EXPERT = {"w1": "gate_proj.weight", "w2": "down_proj.weight", "w3": "up_proj.weight"}  # of mlp.experts.N
_MTP = {
    "hidden_norm": "hnorm.weight",
    "embedding_norm": "enorm.weight",
    "project": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
_OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def to_hugging_face(name: str, num_hidden_layers: int) -> str:
    """Return Hugging Face's name of our global tensor `name`; MTP module k is their layer num_hidden_layers + k.

    Raises KeyError for a name that is not ours.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    kind, number, rest = _split(name)
    if kind == "layers" and number < num_hidden_layers:
        return f"model.layers.{number}.{_translate(rest, _BLOCK, _EXPERT)}"
    if kind == "mtp" and rest in _MTP:
        return f"model.layers.{num_hidden_layers + number}.{_MTP[rest]}"
    if kind == "mtp" and rest.startswith("block."):
        theirs = _translate(rest.removeprefix("block."), _BLOCK, _EXPERT)
        return f"model.layers.{num_hidden_layers + number}.{theirs}"
    raise KeyError(name)


def from_hugging_face(name: str, num_hidden_layers: int) -> str:
    """Return our name of Hugging Face's tensor `name`. Raises KeyError for a name that has no counterpart of ours."""
    outside, block, expert, mtp = (_reversed(table) for table in (_OUTSIDE, _BLOCK, _EXPERT, _MTP))
    if name in outside:
        return outside[name]
    if not name.startswith("model.layers."):
        raise KeyError(name)
    _, number, rest = _split(name.removeprefix("model."))
    if number < num_hidden_layers:
        return f"layers.{number}.{_translate(rest, block, expert)}"
    module = f"mtp.{number - num_hidden_layers}"
    return f"{module}.{mtp[rest]}" if rest in mtp else f"{module}.block.{_translate(rest, block, expert)}"


def shared_copies(num_hidden_layers: int, mtp_depth: int) -> dict[str, str]:
    """Map Hugging Face's names of the MTP modules' repeated tensors to the names of the tensors that they repeat."""
    copies = {}
    for layer in range(num_hidden_layers, num_hidden_layers + mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = _OUTSIDE["embedding"]
        copies[f"model.layers.{layer}.shared_head.head.weight"] = _OUTSIDE["head"]
    return copies


_NUMBER = "(0|[1-9][0-9]*)"  # without leading zeros, so that a tensor has one name


def _split(name: str) -> tuple[str, int, str]:
    match = re.fullmatch(rf"(layers|mtp)\.{_NUMBER}\.(.+)", name)
    if match is None:
        raise KeyError(name)
    return match[1], int(match[2]), match[3]


def _translate(rest: str, block: dict[str, str], expert: dict[str, str]) -> str:
    match = re.fullmatch(rf"mlp\.experts\.{_NUMBER}\.(.+)", rest)
    return block[rest] if match is None else f"mlp.experts.{match[1]}.{expert[match[2]]}"


def _reversed(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
