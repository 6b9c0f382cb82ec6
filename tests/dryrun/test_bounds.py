"""Bounds of what a GPU runs for a layer of DeepSeek-V3: kernels and bytes, by the dry run."""

from __future__ import annotations

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import layout_of, moe_layer

OURS = {
    "add_rms_norm": 1,
    "rms_norm": 7,
    "rms_norm_backward": 4,
    "add_rows": 4,
    "swiglu": 4,
    "swiglu_backward": 2,
    "assemble": 2,
    "assemble_backward": 1,
    "gate": 1,
    "gate_balance": 1,
    "gate_backward": 1,
    "add_three": 1,
}
"""Kernels of the model's own operations in a layer's forward, V3's recomputation, backward and W: every norm, SwiGLU
and assembly of attention's operands runs at most twice, and only once what the backward need not make again."""


def test_a_layer_of_v3_in_bf16_takes_few_kernels_and_bytes() -> None:
    config = load_config("deepseek-v3-671b", ["precision.recipe=bf16"])
    layer = moe_layer(config, layout_of(config, 2048))
    of_model = {name.removeprefix("counterflow::"): number for name, number in layer.kernels.items()}
    assert {name: of_model.get(name) for name in OURS} == OURS
    assert sum(layer.kernels.values()) <= 100
    assert layer.other_bytes <= 15e9, "of 46 GB without fused kernels"
