"""Keys of earlier versions: refused in configurations with their new names, translated in what a run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.moved_keys import MOVED_KEYS, differences, translate
from counterflow.configs.schema import all_keys
from counterflow.configs.write import plain

SPEEDS = {"steps": 4, "bias_update_speed": 0.01, "balance_loss": 1e-3}


def test_new_keys_exist_and_old_ones_do_not() -> None:
    keys = set(all_keys(Config))
    assert set(MOVED_KEYS.values()) <= keys
    assert keys.isdisjoint(MOVED_KEYS)


@pytest.mark.parametrize(("old", "new"), MOVED_KEYS.items())
def test_an_old_key_is_one_fault_that_names_the_new_key(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section, name = old.split(".")
    Path("run.yaml").write_text(f"base: tiny\n{section}:\n  {name}: 0\n")
    for config, overrides, location in (("run.yaml", [], "run.yaml:3"), ("tiny", [f"{old}=0"], f"--set {old}=0")):
        with pytest.raises(ConfigError) as caught:
            load_config(config, overrides)
        assert str(caught.value) == f"1 fault in the configuration\n  {location}: {old}: moved to {new}"


def test_old_keys_in_one_file_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [f"{old}=0" for old in MOVED_KEYS])
    assert {fault.key: fault.message for fault in caught.value.faults} == {
        old: f"moved to {new}" for old, new in MOVED_KEYS.items()
    }


def test_translation_moves_values_and_leaves_its_input_alone() -> None:
    written = {"run": {"name": "a"}, "train": dict(SPEEDS)}
    assert translate(written) == {
        "run": {"name": "a"},
        "train": {"steps": 4},
        "balance": {"bias_update_speed": 0.01, "expert_loss": 1e-3},
    }
    assert written["train"] == SPEEDS
    assert translate(translate(written)) == translate(written)


def test_differences_are_those_of_values_under_any_name() -> None:
    written: dict[str, Any] = {"train": dict(SPEEDS), "batch": {"ramp": None}}
    present: dict[str, Any] = {
        "train": {"steps": 5},
        "balance": {"bias_update_speed": 0.01, "expert_loss": 1e-4},
        "batch": {"ramp": {"start": 8}},
    }
    assert differences(written, present, {}) == {
        "balance.expert_loss": (1e-3, 1e-4),
        "batch.ramp.start": (None, 8),
        "train.steps": (4, 5),
    }


def test_a_key_that_the_earlier_version_lacked_had_its_default() -> None:
    config = load_config("tiny", ["log.every=7", "model.rope_scaling=null"])
    defaults = plain(Config(train={"steps": 1}))
    written = yaml.safe_load(yaml.safe_dump(plain(config)))
    assert differences(written, plain(config), defaults) == {}
    del written["log"]["every"], written["log"]["progress"], written["memory"]
    assert differences(written, plain(config), defaults) == {"log.every": (defaults["log"]["every"], 7)}
