"""A run that version 0.1.0 wrote, four steps of a shrunken `tiny`, continues here under today's keys."""

from __future__ import annotations

import json
import logging
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterflow.checkpoint.manifest import read_manifest
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.moved_keys import MOVED_KEYS, translate
from counterflow.launcher.cli import main
from counterflow.launcher.environment import PARENT_VARIABLE, RANK_VARIABLES
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import make_trainer, write_text
from counterflow.training.run_folder import write_config

ARCHIVE = Path(__file__).parent / "run-0.1.0.tar.xz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the run in `runs/before`, a text in `text`, and no trace of a launcher."""
    monkeypatch.chdir(tmp_path)
    for variable in (*RANK_VARIABLES, PARENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall("runs", filter="data")
    write_text(Path("text"))
    return tmp_path


@pytest.fixture
def config_file(folder: Path) -> str:
    """The configuration of the run with today's keys and two steps more."""
    written = translate(yaml.safe_load(Path("runs/before/config.yaml").read_text()))
    written["train"]["steps"] = 6
    written["checkpoint"]["keep"] = 3
    Path("now.yaml").write_text(yaml.safe_dump(written))
    return "now.yaml"


def metrics() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/before/metrics.jsonl").read_text().splitlines()]


def test_the_run_was_written_with_old_keys(folder: Path) -> None:
    train = yaml.safe_load(Path("runs/before/config.yaml").read_text())["train"]
    assert {f"train.{name}" for name in train} >= set(MOVED_KEYS)
    assert (train["recompute"], train["bias_update_speed"]) == ("v3", 0.01)


def test_it_resumes_and_reports_only_what_was_changed(
    config_file: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = metrics()
    with caplog.at_level(logging.INFO):
        assert main(["train", config_file]) == 0
    (line,) = [record.getMessage() for record in caplog.records if "config changed" in record.getMessage()]
    changes = line.partition(": ")[2].split("; ")
    assert changes == ["checkpoint.keep 1 -> 3", "train.steps 4 -> 6"]
    steps = metrics()
    assert steps[:4] == before
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["tokens"] for step in steps[4:]] == [1280, 1536]
    assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in steps)
    assert [step["bias_update_speed"] for step in steps] == [0.01] * 6
    progress = read_manifest(Path("runs/before/checkpoints/step-6")).progress
    assert (progress["step"], progress["sequences"], progress["optimizer_steps"]) == (6, 48, 6)
    capsys.readouterr()
    assert main(["report", "runs/before", "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert (reported["first_step"], reported["last_step"]) == (1, 6)
    assert main(["placement", "runs/before", "--ranks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == ["1", "mtp.0"]


def test_reading_it_translates_every_key_and_changes_no_value(folder: Path) -> None:
    written = yaml.safe_load(Path("runs/before/config.yaml").read_text())
    Path("same.yaml").write_text(yaml.safe_dump(translate(written)))
    config = load_config("same.yaml")
    assert write_config(Path("runs/before"), config) == []
    assert config.memory.recompute == written["train"]["recompute"]
    assert config.balance.bias_update_speed.at(0) == written["train"]["bias_update_speed"]
    assert config.balance.expert_loss == written["train"]["balance_loss"]
    again = yaml.safe_load(Path("runs/before/config.yaml").read_text())
    assert translate(again) == again, "a new run folder has no old key"


def test_its_configuration_as_a_config_file_is_refused_with_every_new_key(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("runs/before/config.yaml")
    said = {fault.key: fault.message for fault in caught.value.faults}
    assert said == {old: f"moved to {new}" for old, new in MOVED_KEYS.items()}


def test_its_report_and_its_placement_can_be_had_without_resuming(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "runs/before"]) == 0
    assert "1 to 4" in capsys.readouterr().out
    assert main(["placement", "runs/before", "--ranks", "2"]) == 0


def test_its_checkpoint_is_read_in_another_layout(pool: Pool, config_file: str, folder: Path) -> None:
    path = folder / "runs/before/checkpoints/step-4"
    overrides = [f"data.path={folder / 'text'}", f"data.cache_dir={folder / 'cache'}"]
    config = load_config(config_file, overrides)
    for found in pool.run(_steps, 2, config, 2, path):
        assert found["optimizer"] == [4, 6]
        assert found["steps"] == [5, 6]
        assert all(map(math.isfinite, found["losses"]))


def _steps(worker: Worker, config: Any, ep: int, path: Path) -> dict[str, list[Any]]:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.restore(path)
    optimizer = [trainer.optimizer.steps]
    taken = [trainer.step() for _ in range(2)]
    optimizer.append(trainer.optimizer.steps)
    trainer.close()
    return {
        "optimizer": optimizer,
        "steps": [step.step for step in taken],
        "losses": [step.loss for step in taken],
    }
