"""Architectures read from Hugging Face files: `model: {from: config.json}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.model.config import ModelConfig, RopeScaling
from counterflow.model.counts import count_parameters

# The architecture of moonshotai/Moonlight-16B-A3B, a DeepSeek-V3-class model, as its file of transformers 4 has it.
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map":
    {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id":
    163584, "eos_token_id": 163586, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264, "kv_lora_rank": 512,
    "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method":
    "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": True, "v_head_dim":
    128, "vocab_size": 163840,
}  # fmt: skip
# The architectures of deepseek-ai/DeepSeek-V2 and DeepSeek-V2-Lite, as their files of transformers 4 have them.
V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map":
    {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling":
    {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
     "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 16.0,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 3, "topk_method":
    "group_limited_greedy", "torch_dtype": "bfloat16", "transformers_version": "4.39.3", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V2_LITE: dict[str, Any] = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "rope_scaling": V2["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
# Keys that transformers' DeepseekV3Config has in the same form; its router is fixed.
COMPARED = set(ModelConfig.model_fields) - {
    *("initializer_range", "rope_theta", "rope_scaling", "topk_method", "scoring_func")
}
YARN_V3 = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(architecture: dict[str, Any], model: str = "", *overrides: str) -> Config:
    """Load a config whose model comes from a JSON file in a folder next to it."""
    Path("hf").mkdir(exist_ok=True)
    Path("hf/config.json").write_text(json.dumps(architecture, indent="\t"), encoding="utf-8")
    Path("run.yaml").write_text(
        f"model:\n  from: hf/config.json\n{model}\nbatch: {{sequence_length: 8}}\ntrain: {{steps: 1}}\n"
    )
    return load_config("run.yaml", overrides)


def faults_of(changes: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load({name: value for name, value in (MOONLIGHT | changes).items() if name not in without})
    return [str(fault) for fault in caught.value.faults]


def line_of(name: str) -> int:
    lines = Path("hf/config.json").read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.lstrip().startswith(f'"{name}"'))


def test_file_of_transformers_4_gives_its_architecture() -> None:
    model = load(MOONLIGHT).model
    taken = {name: value for name, value in MOONLIGHT.items() if name in ModelConfig.model_fields}
    taken.pop("initializer_range")
    assert len(taken) == len(ModelConfig.model_fields) - 2  # all but initializer_range and the absent rope_scaling
    assert {name: getattr(model, name) for name in taken} == taken
    assert model.rope_scaling is None


def test_initial_weights_are_those_of_training_not_of_the_file() -> None:
    assert load(MOONLIGHT).model.initializer_range == 0.006
    assert load(MOONLIGHT, "  initializer_range: 0.01").model.initializer_range == 0.01


def test_keys_of_the_yaml_and_of_set_come_on_top_of_the_file() -> None:
    model = load(MOONLIGHT, "  num_hidden_layers: 3\n  rope_scaling: {factor: 2}", "model.vocab_size=99").model
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (3, 99, 2048)
    assert model.rope_scaling == RopeScaling(factor=2)


def test_file_is_found_beside_the_yaml_its_folder_is_enough_and_set_starts_from_here() -> None:
    Path("deep").mkdir()
    Path("deep/config.json").write_text(json.dumps(MOONLIGHT))
    Path("deep/run.yaml").write_text("base: tiny\nmodel: {from: ./}\n")
    assert load_config("deep/run.yaml").model.hidden_size == 2048
    assert load_config("tiny", ["model.num_hidden_layers=2", "model.from=deep"]).model.num_hidden_layers == 2


def test_file_replaces_the_whole_architecture_of_a_base() -> None:
    Path("config.json").write_text(json.dumps({"model_type": "deepseek_v3", "rope_scaling": None}))
    Path("low.yaml").write_text("base: tiny\nmodel: {rope_scaling: {factor: 3}}")
    Path("run.yaml").write_text("base: low.yaml\nmodel: {from: config.json}\n")
    assert load_config("run.yaml").model == ModelConfig(initializer_range=load_config("tiny").model.initializer_range)


@pytest.mark.parametrize("generation", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_from_both_generations(generation: str) -> None:
    if generation == "rope_scaling":
        rope: dict[str, Any] = {"rope_theta": 20000, "rope_scaling": YARN_V3}
    else:
        rope = {"rope_parameters": YARN_V3 | {"rope_type": "yarn", "rope_theta": 20000}}
    without_theta = {name: value for name, value in MOONLIGHT.items() if name != "rope_theta"}
    model = load(without_theta | rope).model
    assert model.rope_theta == 20000
    assert model.rope_scaling == RopeScaling(
        factor=40, original_max_position_embeddings=4096, mscale=1, mscale_all_dim=1
    )


def test_rope_parameters_of_type_default_are_no_scaling() -> None:
    model = load(MOONLIGHT | {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}).model
    assert (model.rope_theta, model.rope_scaling) == (3.0, None)


def test_yarn_keys_left_out_mean_the_same_as_in_transformers() -> None:
    # No mscale: the rotation is scaled by 0.1 ln s + 1, the softmax not at all; the context is the file's.
    scaling = load(MOONLIGHT | {"rope_scaling": {"type": "yarn", "factor": 4}}).model.rope_scaling
    assert scaling == RopeScaling(factor=4, original_max_position_embeddings=8192, mscale=1, mscale_all_dim=0)


def test_files_written_by_transformers_are_read_back_with_their_values() -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.DeepseekV3Config(
        vocab_size=500, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, n_shared_experts=3, n_routed_experts=12,
        routed_scaling_factor=1.5, kv_lora_rank=20, q_lora_rank=None, qk_rope_head_dim=4, v_head_dim=10,
        qk_nope_head_dim=14, n_group=3, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=2,
        norm_topk_prob=False, max_position_embeddings=640, rms_norm_eps=1e-5, num_nextn_predict_layers=2,
        rope_theta=5000.0, rope_scaling=YARN_V3 | {"factor": 10.0},
    )  # fmt: skip
    hf.save_pretrained("saved")
    model = load_config("tiny", ["model.from=saved"]).model
    for name in COMPARED:
        assert getattr(model, name) == getattr(hf, name), name
    assert model.rope_theta == hf.rope_parameters["rope_theta"] == 5000.0
    assert model.rope_scaling is not None
    for name in set(RopeScaling.model_fields) - {"type"}:
        assert getattr(model.rope_scaling, name) == hf.rope_parameters[name], name


def test_our_defaults_are_those_of_transformers() -> None:
    # A key that a file leaves out must mean the same here.
    transformers = pytest.importorskip("transformers")
    hf, ours = transformers.DeepseekV3Config(), ModelConfig()
    for name in COMPARED:
        assert getattr(hf, name) == getattr(ours, name), name
    assert hf.rope_parameters == {"rope_theta": ours.rope_theta, "rope_type": "default"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_act", "gelu", "is 'gelu'; this model only supports 'silu'"),
        ("tie_word_embeddings", True, "is true; this model only supports false"),
        ("attention_bias", True, "is true; this model only supports false"),
        ("attention_dropout", 0.1, "is 0.1; this model only supports 0"),
        ("moe_layer_freq", 2, "is 2; this model only supports 1"),
        ("rope_interleave", False, "is false; this model only supports true"),
        ("num_key_value_heads", 4, "is 4; this model only supports 16"),
        ("head_dim", 128, "is 128; this model only supports 64"),
        ("qk_head_dim", 128, "is 128; this model only supports 192"),
        ("num_expert_per_tok", 4, "unknown key (did you mean num_experts_per_tok?)"),
        ("sliding_window", 4096, "unknown key (it may change the network; remove it if it does not)"),
    ],
)
def test_unsupported_values_are_refused_at_their_lines(name: str, value: object, message: str) -> None:
    (fault,) = faults_of({name: value})
    assert fault == f"hf/config.json:{line_of(name)}: {name}: {message}"


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "linear", "factor": 2}, "rope_scaling.type: is 'linear'; this model only supports 'yarn'"),
        ({"factor": 2}, "rope_scaling: expects an object with a `type` (or `rope_type`)"),
        ({"type": "yarn"}, "rope_scaling: needs a `factor`"),
        ({"type": "yarn", "factor": 2, "mscale_all_dim": 0.7}, "rope_scaling: give both mscale and mscale_all_dim"),
        ({"type": "yarn", "factor": 2, "mscale": 0.7}, "rope_scaling: give both mscale and mscale_all_dim"),
        ({"type": "yarn", "factor": 2, "attention_factor": 2}, "rope_scaling.attention_factor: is not supported"),
        ({"type": "yarn", "factor": 2, "truncate": False}, "rope_scaling.truncate: is false"),
        (
            {"type": "yarn", "factor": 2, "beta_fats": 1},
            "rope_scaling.beta_fats: unknown key (did you mean beta_fast?)",
        ),
    ],
)
def test_unknown_rotations_are_refused(rope: dict[str, object], message: str) -> None:
    (fault,) = faults_of({"rope_scaling": rope})
    assert message in fault
    assert int(fault.split(":")[1]) >= line_of("rope_scaling")


def test_config_of_another_model_is_refused_once() -> None:
    (fault,) = faults_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "scoring_func": "softmax"})
    assert "model_type: expects 'deepseek_v3' or 'deepseek_v2', found 'mixtral': this is the config of another" in fault


@pytest.mark.parametrize("file", [V2, V2_LITE], ids=["V2", "V2-Lite"])
def test_v2_files_give_their_network_and_router(file: dict[str, Any]) -> None:
    model = load(file).model
    taken = {name: value for name, value in file.items() if name in ModelConfig.model_fields}
    del taken["initializer_range"], taken["rope_scaling"]
    assert {name: getattr(model, name) for name in taken} == taken
    assert (model.topk_method, model.scoring_func) == (file["topk_method"], "softmax")
    assert model.rope_scaling is not None and model.rope_scaling.mscale == file["rope_scaling"]["mscale"]
    assert model.num_nextn_predict_layers == 0
    # V2 §3.1.2: 236B, 21B of them active; V2 appendix B: 15.7B, 2.4B.
    counts = count_parameters(model)
    total, active = (236e9, 21e9) if file is V2 else (15.7e9, 2.4e9)
    assert counts.total == pytest.approx(total, rel=5e-3)
    assert counts.active == pytest.approx(active, rel=0.12)  # the report leaves embedding and head out in part


def test_keys_that_a_v2_file_leaves_out_mean_the_same_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.DeepseekV2Config()
    model = load(
        {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": None, "moe_intermediate_size": 8}
    ).model
    without = {"num_experts_per_tok", "moe_intermediate_size", "num_nextn_predict_layers"}
    for name in (COMPARED | {"topk_method"}) - without:
        assert getattr(model, name) == (1 if name in ("n_group", "topk_group") else getattr(hf, name)), name
    assert (model.scoring_func, model.num_nextn_predict_layers) == ("softmax", 0)


def test_v2_files_written_by_transformers_are_read_back_with_their_values() -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.DeepseekV2Config(
        vocab_size=500, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, n_shared_experts=3, n_routed_experts=12,
        routed_scaling_factor=1.5, kv_lora_rank=20, q_lora_rank=None, qk_rope_head_dim=4, v_head_dim=10,
        qk_nope_head_dim=14, n_group=3, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=2,
        topk_method="group_limited_greedy", max_position_embeddings=640, rms_norm_eps=1e-5,
    )  # fmt: skip
    hf.save_pretrained("saved")
    model = load_config("tiny", ["model.from=saved"]).model
    for name in (COMPARED | {"topk_method"}) - {"num_nextn_predict_layers"}:
        assert getattr(model, name) == getattr(hf, name), name


def test_v2_files_that_can_be_read_in_two_ways_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value for name, value in (V2 | {"norm_topk_prob": True}).items() if name != "num_experts_per_tok"})
    missing, normalised = (str(fault) for fault in caught.value.faults)
    assert "num_experts_per_tok: is missing" in missing
    assert (
        f"hf/config.json:{line_of('norm_topk_prob')}: norm_topk_prob: is true, which transformers ignores" in normalised
    )


def test_derived_models_of_the_same_architecture_are_read() -> None:
    assert load(MOONLIGHT | {"model_type": "kimi_k2"}).model.hidden_size == 2048


def test_wrong_values_in_the_file_are_faults_at_its_lines() -> None:
    faults = faults_of({"hidden_size": "wide", "topk_group": 3})
    assert faults == [
        f"hf/config.json:{line_of('hidden_size')}: model.hidden_size: expects a whole number, got 'wide'",
        f"hf/config.json:{line_of('topk_group')}: model.topk_group: 3 is above n_group 1",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read hf/config.json: No such file"),
        ("{", "hf/config.json is not JSON"),
        ("[]", "holds no JSON object"),
    ],
)
def test_unreadable_file_is_a_fault_where_it_was_named(content: str | None, message: str) -> None:
    Path("hf").mkdir()
    if content is not None:
        Path("hf/config.json").write_text(content)
    Path("run.yaml").write_text("train: {steps: 1}\nmodel:\n  from: hf/config.json\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    (fault,) = caught.value.faults
    assert str(fault).startswith("run.yaml:3: model.from: ")
    assert message in str(fault)
