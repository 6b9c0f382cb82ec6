"""Widths that GPUs cannot take in BF16: refused for GPUs before a rank starts, and for CPUs never."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.configs.clashes import gpu_width_clashes
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.source import shipped
from counterflow.settings import UsageError
from counterflow.training.preflight import prepare_run

UNEVEN = ["model.v_head_dim=12", "model.q_lora_rank=20", "precision.recipe=bf16"]
V_HEAD = "model.v_head_dim 12 is not a multiple of 8, as GPUs need in bf16 (nearest: 8 or 16; run.device cpu takes any"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_configs_suit_gpus(name: str) -> None:
    config = load_config(name)
    assert gpu_width_clashes(config.model, config.precision) == []


def test_a_config_for_gpus_does_not_load_with_such_a_width() -> None:
    with pytest.raises(ConfigError, match="q_lora_rank: 20 is not a multiple of 8") as refused:
        load_config("tiny", [*UNEVEN, "run.device=cuda"])
    assert len(refused.value.faults) == 2
    load_config("tiny", [*UNEVEN, "run.device=cuda", "precision.recipe=fp32"])
    assert load_config("tiny", UNEVEN).model.v_head_dim == 12


def test_a_launch_on_gpus_refuses_what_one_on_cpus_trains(tmp_path: Path) -> None:
    config = load_config("tiny", [*UNEVEN, f"run.dir={tmp_path}"])
    assert prepare_run(config, 1, 1, tmp_path, device="cpu").complete is False
    with pytest.raises(UsageError) as refused:
        prepare_run(config, 1, 1, tmp_path, device="cuda")
    assert V_HEAD in str(refused.value) and "model.q_lora_rank 20 is not" in str(refused.value)
