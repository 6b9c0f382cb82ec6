"""Our names of global tensors and Hugging Face's DeepSeek-V3 names: one table, read both ways.

`{}` stands for a number; the only names it does not cover are the MTP modules' copies of the embedding and of the
output head, which Hugging Face's files repeat and we share (`shared_copies`).
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
    "mlp.experts.{}.w1": "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.w2": "mlp.experts.{}.down_proj.weight",
    "mlp.experts.{}.w3": "mlp.experts.{}.up_proj.weight",
}
_MTP = {
    "hidden_norm": "hnorm.weight",
    "embedding_norm": "enorm.weight",
    "project": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
_OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def to_hugging_face(name: str, num_hidden_layers: int) -> str:
    """Hugging Face's name of our global tensor `name`; MTP module k is their layer num_hidden_layers + k.

    Raises KeyError for a name that is not ours.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    kind, layer, rest = _split(name)
    if kind == "mtp":
        theirs = _MTP[rest] if rest in _MTP else _translate(rest.removeprefix("block."), _BLOCK)
        return f"model.layers.{num_hidden_layers + layer}.{theirs}"
    return f"model.layers.{layer}.{_translate(rest, _BLOCK)}"


def from_hugging_face(name: str, num_hidden_layers: int) -> str:
    """Our name of Hugging Face's tensor `name`. Raises KeyError for a name that has no counterpart of ours."""
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    if name in outside:
        return outside[name]
    _, layer, rest = _split(name.removeprefix("model."))
    if layer < num_hidden_layers:
        return f"layers.{layer}.{_translate(rest, _reversed(_BLOCK))}"
    module = f"mtp.{layer - num_hidden_layers}"
    mtp = _reversed(_MTP)
    return f"{module}.{mtp[rest]}" if rest in mtp else f"{module}.block.{_translate(rest, _reversed(_BLOCK))}"


def shared_copies(num_hidden_layers: int, mtp_depth: int) -> dict[str, str]:
    """Hugging Face's repeated tensors of the MTP modules, and the tensor of theirs that each one repeats."""
    copies = {}
    for layer in range(num_hidden_layers, num_hidden_layers + mtp_depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = _OUTSIDE["embedding"]
        copies[f"model.layers.{layer}.shared_head.head.weight"] = _OUTSIDE["head"]
    return copies


def _split(name: str) -> tuple[str, int, str]:
    match = re.fullmatch(r"(layers|mtp)\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    return match[1], int(match[2]), match[3]


def _translate(rest: str, table: dict[str, str]) -> str:
    number = re.search(r"\d+", rest.removeprefix("mlp.experts.")) if rest.startswith("mlp.experts.") else None
    if number is None:
        return table[rest]
    return table[rest.replace(f".{number[0]}.", ".{}.", 1)].format(number[0])


def _reversed(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
