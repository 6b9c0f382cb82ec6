"""What the loader says of a configuration that cannot work: every fault, where it is, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.schema import all_keys
from counterflow.settings import SectionFaults, UsageError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def faults_of(text: str, *overrides: str, name: str = "run.yaml") -> list[str]:
    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return [str(fault) for fault in caught.value.faults]


def test_all_faults_of_all_files_are_reported_at_once() -> None:
    Path("low.yaml").write_text("data:\n  source: file\n  patterns: [1, a]\ncomm: 7\n", encoding="utf-8")
    text = """\
base: low.yaml
model:
  hiden_size: 3
  n_group: 3
  q_lora_rank: x
batch:
  sequence_length: 8192
  ramp: {strat: 3, tokens: "5", increment: 1}
optim:
  lr:
    - {tokens: 1e9, start: 0, end: -1e-4}
    - {vlue: 1}
  clip_norm: .inf
train:
  steps: 1.5
"""
    assert faults_of(text, "parallel.dp=atuo", "log.every=0", "run.name=.x") == [
        "run.yaml:3: model.hiden_size: unknown key (did you mean model.hidden_size?)",
        "run.yaml:4: model.n_routed_experts: 256 is not a multiple of n_group 3",
        "run.yaml:4: model.topk_group: 4 is above n_group 3",
        "run.yaml:5: model.q_lora_rank: expects a whole number or null, got 'x'",
        "run.yaml:7: batch.sequence_length: 8192 is above model.max_position_embeddings 4096",
        "run.yaml:8: batch.ramp.tokens: expects a number, got '5' (write the number without quotes)",
        "run.yaml:8: batch.ramp.strat: unknown key (did you mean batch.ramp.start?)",
        "run.yaml:11: optim.lr[0].end: must be at least 0, is -1e-4",
        "run.yaml:12: optim.lr[1].vlue: unknown key (did you mean optim.lr[1].value?)",
        "run.yaml:13: optim.clip_norm: must be finite, is .inf",
        "run.yaml:15: train.steps: expects a whole number or null, got 1.5",
        "low.yaml:2: data.source: expects builtin or folder, got 'file' (did you mean folder?)",
        "low.yaml:4: comm: expects a section of keys, got 7",
        "--set log.every=0: log.every: must be at least 1, is 0",
        "--set parallel.dp=atuo: parallel.dp: expects a whole number or auto, got 'atuo' (did you mean auto?)",
        "--set run.name=.x: run.name: is '.x'; as a folder it starts with a letter or digit and holds only those, "
        "'.', '_' and '-'",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.compile=yes", "expects true or false, got 'yes' (write true)"),
        ("run.compile=1", "expects true or false, got 1"),
        ("train.steps=true", "expects a whole number or null, got true"),
        ("train.evaluate_every=null", "expects a whole number, got null"),
        ("train.evaluate_every=[1]", "expects a whole number, got a list"),
        ("memory.recompute=ful", "expects none, v3 or full, got 'ful' (did you mean full?)"),
        ("optim.eps=0", "must be above 0, is 0"),
        ("optim.beta1=1", "must be below 1, is 1"),
        ("model.qk_rope_head_dim=7", "must be a multiple of 2, is 7"),
        ("model.vocab_size='5'", "expects a whole number, got '5' (write the number without quotes)"),
        ("data.patterns=x", "expects a list, each item text, got 'x'"),
        ("data.patterns=[]", "must not be empty"),
        ("run.dir={a: 1}", "expects text, got a section of keys"),
        ("run.dir=null", "expects text, got null"),
        ("optim.lr=abc", "expects a number or a list of phases, got 'abc'"),
        ("optim.lr=null", "expects a number or a list of phases, got null"),
        ("optim.lr=[]", "must not be empty"),
        (
            "optim.lr={value: 1}",
            "expects a number or a list of phases: put `- ` before a phase, also before a single one",
        ),
        ("optim.lr=[{tokens: 1}]", "a phase takes either `value` or both `start` and `end`"),
        (
            "optim.lr=[{value: 1}, {value: 2}]",
            "phase 0 needs its length in `tokens`: only the last phase may leave it out",
        ),
        ("optim.lr=[{start: 1, end: 2}]", "a phase that moves from `start` to `end` needs its length in `tokens`"),
        ("optim.lr=-1", "must be at least 0, is -1"),
        ("log=3", "expects a section of keys, got 3"),
        ("log=[3]", "expects a section of keys, got a list"),
        ("batch.ramp=3", "expects a section of keys or null, got 3"),
        ("parallel.ep=3", "3 does not divide model.n_routed_experts 8 (nearest: 2 or 4)"),
        ("parallel.ep=16", "16 does not divide model.n_routed_experts 8 (nearest: 8)"),
        ("model.first_k_dense_replace=4", "4 is above num_hidden_layers 3"),
        (
            "model.num_experts_per_tok=5",
            "5 is above the 4 experts in 2 of 4 groups of 8 experts (nearest: 4, or topk_group 3)",
        ),
        ("model.num_experts_per_tok=9", "9 is above the 4 experts in 2 of 4 groups of 8 experts (nearest: 4)"),
        ("model.topk_group=0", "must be at least 1, is 0"),
        ("batch.sequence_length=257", "257 is above model.max_position_embeddings 256"),
        ("model.hidden_size=66", "66 is not a multiple of 4, as experts in fp32 need (nearest: 64 or 68)"),
        ("model.moe_intermediate_size=33", "33 is not a multiple of 4, as experts in fp32 need (nearest: 32 or 36)"),
        ("log.peak_tflops=0", "must be above 0 or auto, is 0"),
        ("log.peak_tflops=-1", "must be above 0 or auto, is -1"),
    ],
)
def test_one_fault_gives_one_readable_message(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    (fault,) = caught.value.faults
    assert fault.message == message
    assert str(fault.location) == f"--set {override}"
    assert fault.key.startswith(override.partition("=")[0])


def test_sections_are_checked_against_each_other_at_the_line_of_the_key() -> None:
    text = "base: tiny\nbatch:\n  global_sequences: 9\n  ramp:\n    start: 12\n    tokens: 5\n    increment: 2\n"
    assert faults_of(text, "parallel.dp=6", "parallel.ep=4") == [
        "run.yaml:3: batch.global_sequences: 9 is not a multiple of ramp.increment 2",
        "run.yaml:5: batch.ramp.start: 12 is above global_sequences 9",
        "--set parallel.dp=6: parallel.dp: 6 is not a positive multiple of parallel.ep 4 (nearest: 4 or 8)",
    ]
    assert faults_of("base: tiny", "parallel.dp=-4") == [
        "--set parallel.dp=-4: parallel.dp: -4 is not a positive multiple of parallel.ep 1 (nearest: 1)"
    ]


def test_widths_of_experts_fill_16_bytes_in_their_format() -> None:
    text = "base: tiny\nmodel:\n  hidden_size: 68\n  moe_intermediate_size: 36\n"
    assert faults_of(text, "precision.recipe=bf16") == [
        "--set precision.recipe=bf16: model.hidden_size: 68 is not a multiple of 8, as experts in bf16 need "
        "(nearest: 64 or 72)",
        "--set precision.recipe=bf16: model.moe_intermediate_size: 36 is not a multiple of 8, as experts in bf16 need "
        "(nearest: 32 or 40)",
    ]
    assert load_config("run.yaml").model.hidden_size == 68, "fits FP32"
    assert load_config("tiny", ["precision.recipe=bf16", "model.hidden_size=72"]).model.hidden_size == 72


def test_clash_of_a_key_with_one_of_a_base_is_put_where_the_user_wrote_last() -> None:
    (fault,) = faults_of("base: tiny\nmodel:\n  n_group: 3\n")
    assert fault == "run.yaml:3: model.n_routed_experts: 8 is not a multiple of n_group 3"
    assert faults_of("base: tiny\nmodel:\n  n_routed_experts: 6\n", "model.n_group=5") == [
        "--set model.n_group=5: model.n_routed_experts: 6 is not a multiple of n_group 5"
    ]


def test_checks_between_keys_do_not_blame_a_key_for_the_misspelling_of_another() -> None:
    # With n_gruop read as nothing, n_group would be 8 and 4 experts no multiple of it.
    text = "base: tiny\nmodel:\n  n_routed_experts: 4\n  n_gruop: 4\ntrain: {steps: 1}\n"
    Path("other.yaml").write_text("train: {steps: 1}\nmodel: {n_routed_experts: 4, n_gruop: 4, topk_group: 1}")
    assert faults_of(text) == ["run.yaml:4: model.n_gruop: unknown key (did you mean model.n_group?)"]
    with pytest.raises(ConfigError) as caught:
        load_config("other.yaml")
    assert [fault.key for fault in caught.value.faults] == ["model.n_gruop"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model: {lr: 1}", "lr is a key of optim"),
        ("lr: 1", "lr is a key of optim"),
        ("train: {every: 1}", "every is a key of parallel.expert_placement, checkpoint or log"),
        ("batch: {start: 1}", "start is a key of batch.ramp"),
        ("modle: {}", "did you mean model?"),
        ("model: {num_hiden_layers: 1}", "did you mean model.num_hidden_layers?"),
        ("model: {weight_decya: 1}", "did you mean optim.weight_decay?"),
        ("optim.lr: 1", "write it nested: `lr:` below `optim:`"),
        ("comm: {xyzzy: 1}", "keys of comm: backend, dispatcher"),
        ("model: {xyzzy: 1}", "`counterflow config --explain` shows them with their meaning"),
    ],
)
def test_unknown_key_says_what_may_have_been_meant(text: str, hint: str) -> None:
    (fault,) = faults_of(f"base: tiny\n{text}")
    assert re.search(rf"^run\.yaml:2: \S+: unknown key \(.*{re.escape(hint)}", fault), fault


def test_every_misspelt_key_is_recognised() -> None:
    for key in all_keys(Config):
        section, _, name = key.rpartition(".")
        if section.count(".") or not section or len(name) < 5:
            continue
        wrong = name[:2] + name[3:]
        with pytest.raises(ConfigError) as caught:
            load_config("tiny", [f"{section}.{wrong}=1"])
        assert f"did you mean {key}?" in str(caught.value)


def test_what_is_required_is_named_with_its_meaning() -> None:
    assert faults_of("model: {vocab_size: 9}") == [
        "run.yaml:1: train: is required: length of training, and its evaluations"
    ]
    assert faults_of("# nothing\n") == ["run.yaml:1: train: is required: length of training, and its evaluations"]
    assert faults_of("run:\n  seed: 1\ntrain:\n  evaluate_every: 3") == [
        "run.yaml:3: train: give `steps` or `tokens`: a run needs an end"
    ]
    assert faults_of("base: tiny\nbatch:\n  ramp:\n    start: 8\n    tokens: 3\n") == [
        "run.yaml:3: batch.ramp.increment: is required: the batch grows in multiples of this, whatever the layout"
    ]


def test_repeated_key_is_a_fault_with_both_lines() -> None:
    assert faults_of("base: tiny\noptim:\n  lr: 1\n  beta1: 0\n  lr: 2\n") == [
        "run.yaml:5: optim.lr: is given twice (first on line 3)"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: {steps: 1", "run.yaml:1: cannot be read as YAML"),
        ("train:\n\tsteps: 1", "run.yaml:2: cannot be read as YAML"),
        ("train:\n  steps: *.txt", "run.yaml:2: cannot be read as YAML"),
        ("- a\n- b", "run.yaml:1: expects sections, such as `model:` and `train:`"),
        ("just text", "run.yaml:1: expects sections"),
        ("a: 1\n---\nb: 1", "run.yaml:2: cannot be read as YAML"),
        ("train: {steps: \x07}", "run.yaml: cannot be read as YAML"),
        ("base: [a, b]\n", "run.yaml:1: base: expects the path of a YAML file or the name of a shipped config"),
        ("base: tiny\n? [a, b]\n: 1", "run.yaml:2: a key is a single word"),
        ("base: tiny\nrun: &a\n  name: *a", "run.yaml:3: run.name: is an alias of something it is part of"),
        ("base: tiny\nrun: {seed: !!int x}", "run.yaml:2: run.seed: cannot be read"),
        ("base: tiny\nrun: {seed: !secret x}", "run.yaml:2: run.seed: cannot be read"),
        ("base: tiny\nmodel: {from: 3}", "run.yaml:2: model.from: expects the path of a Hugging Face config.json"),
    ],
)
def test_file_that_is_no_configuration_is_a_fault_at_its_line(text: str, fault: str) -> None:
    assert faults_of(text)[0].startswith(fault)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expects KEY=VALUE with a dotted key"),
        ("=3", "expects KEY=VALUE with a dotted key"),
        ("train..steps=3", "expects KEY=VALUE with a dotted key"),
        ("base=tiny", "a base is given in a file only"),
        ("data.patterns=*.txt", "put text that starts with a special character in quotes"),
        ("trian.steps=3", "did you mean train?"),
    ],
)
def test_wrong_set_is_shown_as_it_was_typed(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert str(caught.value.faults[0]).startswith(f"--set {override}: ")
    assert message in str(caught.value)


def test_faults_of_the_command_line_and_of_the_file_come_together() -> None:
    faults = faults_of("base: tiny\nfoo: 1", "train.steps", "train.steps=x")
    assert [fault.split(": ")[0] for fault in faults] == ["run.yaml:2", "--set train.steps", "--set train.steps=x"]


def test_config_error_is_a_usage_error_that_prints_all_its_faults() -> None:
    with pytest.raises(UsageError) as caught:
        load_config("tiny", ["train.steps=x", "run.compile=x"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 faults in the configuration"
    assert [line.strip() for line in lines[1:]] == [str(fault) for fault in caught.value.faults]  # type: ignore[attr-defined]


def test_clashing_keys_in_code_name_both_keys_and_numbers() -> None:
    with pytest.raises(
        ValidationError, match="n_routed_experts 256 is not a multiple of n_group 3; topk_group 4 is above"
    ) as e:
        Config(model={"n_group": 3}, train={"steps": 1})
    assert isinstance(e.value.errors()[0]["ctx"]["error"], SectionFaults)


ONE_GROUP = "is for several groups of experts, but model.n_group is 1 (works: model.n_group 2, 4, 8 or"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (
            ["balance.device_loss=0.05", "model.n_group=1", "model.topk_group=1"],
            "balance.device_loss",
            f"0.05 {ONE_GROUP} balance.device_loss 0)",
        ),
        (
            ["balance.communication_loss=0.02", "model.n_group=1", "model.topk_group=1", "model.topk_method=greedy"],
            "balance.communication_loss",
            f"0.02 {ONE_GROUP} balance.communication_loss 0)",
        ),
        (
            ["balance.capacity_factor=1", "model.n_group=1", "model.topk_group=1"],
            "balance.capacity_factor",
            f"1 {ONE_GROUP} balance.capacity_factor null)",
        ),
        (
            ["balance.bias_update_speed=0.01", "model.topk_method=greedy"],
            "balance.bias_update_speed",
            "moves a bias that the router of model.topk_method greedy has not (leave it out or set it to 0, or "
            "model.topk_method noaux_tc; balance.expert_loss works with every router)",
        ),
        (
            ["model.topk_method=gready"],
            "model.topk_method",
            "expects noaux_tc, group_limited_greedy or greedy, got 'gready' (did you mean greedy?)",
        ),
        (
            ["model.topk_method=greedy", "model.num_experts_per_tok=9"],
            "model.num_experts_per_tok",
            "9 is above n_routed_experts 8",
        ),
    ],
)
def test_what_a_router_cannot_use_is_refused_with_what_works(overrides: list[str], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    (fault,) = caught.value.faults
    assert (fault.key, fault.message) == (key, message)


def test_a_router_without_a_bias_leaves_the_default_speed_alone() -> None:
    for speed in (
        [],
        ["balance.bias_update_speed=0"],
        ["balance.bias_update_speed=[{tokens: 5, value: 0}, {value: 0}]"],
    ):
        assert load_config("tiny", ["model.topk_method=group_limited_greedy", *speed]).model.n_group == 4
    reached = ["model.topk_method=greedy", "model.num_experts_per_tok=5"]  # more than topk_group would allow
    assert load_config("tiny", reached).model.num_experts_per_tok == 5
