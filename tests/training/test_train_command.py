"""`counterflow train` in real processes: bare, with --nproc, under torchrun; killed and run again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from counterflow.checkpoint.manifest import complete_steps
from counterflow.launcher.cli import main
from counterflow.launcher.environment import PARENT_VARIABLE, RANK_VARIABLES
from counterflow.tests.training.harness import NUMBERS, relative, settings

PYTHON = [sys.executable, "-P"]
TWO = [*PYTHON, "-m", "counterflow", "train", "tiny", "--nproc", "2"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["-m", "counterflow", "train", "tiny"]
STEPS = 20
PATIENCE = 300.0  # seconds, on a busy machine
EXACT = (*NUMBERS, "validation_loss", "max_vio", "lr", "tokens")


class Launcher:
    """Starter of runs in a separate folder."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.folder = folder
        self._settings = [
            *settings(text),
            f"train.steps={STEPS}",
            "train.evaluate_every=7",
            "checkpoint.every=4",
            "log.peak_tflops=0.1",
            "log.tensorboard=false",
        ]
        # Variables of a pool's rank or of an outer launcher must not reach these runs.
        self._environment = {n: v for n, v in os.environ.items() if n not in RANK_VARIABLES}

    def start(self, command: Sequence[str], name: str, *overrides: str) -> subprocess.Popen[str]:
        sets = [f"--set={each}" for each in (*self._settings, f"run.name={name}", *overrides)]
        return subprocess.Popen(
            [*command, *sets, "--json"],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_here(self, monkeypatch: pytest.MonkeyPatch, name: str, *overrides: str) -> None:
        """Run in this process, which no launcher started."""
        monkeypatch.chdir(self.folder)
        for variable in (*RANK_VARIABLES, PARENT_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        sets = [f"--set={each}" for each in (*self._settings, f"run.name={name}", *overrides)]
        assert main(["train", "tiny", *sets, "--json"]) == 0

    def run(self, command: Sequence[str], name: str, *overrides: str) -> dict[str, Any]:
        """Run to the end and return the line that `--json` ends with."""
        process = self.start(command, name, *overrides)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def state(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """Step and all tensors of the newest checkpoint, read without our own reader."""
        steps = complete_steps(self.folder / "runs" / name / "checkpoints")
        path = steps[max(steps)]
        index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in index.items()}
        with warnings.catch_warnings(action="ignore"):  # warnings about a process without a group, as this one is
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return max(steps), tensors


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("launches"), text)


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher) -> dict[str, Any]:
    """Result of a run of two ranks that nothing stops."""
    return launcher.run(TWO, "unbroken", "log.tensorboard=true")


def exact(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers that do not depend on the clock."""
    return [{name: step[name] for name in EXACT} for step in metrics]


def test_the_run_ends_with_one_line_of_json(launcher: Launcher, unbroken: dict[str, Any]) -> None:
    assert {"steps", "loss", "validation_loss", "tokens_per_second", "run_dir"} <= unbroken.keys()
    last = launcher.metrics("unbroken")[-1]
    assert unbroken["steps"] == STEPS
    assert unbroken["loss"] == last["loss"]
    assert unbroken["validation_loss"] == last["validation_loss"]
    assert unbroken["tokens_per_second"] > 0
    assert unbroken["run_dir"] == "runs/unbroken"


def test_the_run_folder_holds_config_metrics_checkpoints_logs_and_tensorboard(
    launcher: Launcher, unbroken: dict[str, Any]
) -> None:
    folder = launcher.folder / unbroken["run_dir"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoints", "config.yaml", "logs", "metrics.jsonl", "tensorboard"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == STEPS
    assert list(complete_steps(folder / "checkpoints")) == [16, 20], "checkpoint.keep is 2"
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert any((folder / "tensorboard").iterdir())
    metrics = launcher.metrics("unbroken")
    assert [step["step"] for step in metrics] == list(range(1, STEPS + 1))
    assert [step["step"] for step in metrics if step["validation_loss"] is not None] == [7, 14, 20]


def kill_everything(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and all its ranks with SIGKILL."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=PATIENCE)


@pytest.mark.long(claim="tests/training/test_resume.py::test_in_the_same_layout_every_bit_is_that_of_the_unbroken_run")
def test_killed_at_any_step_and_gone_on_with_under_torchrun_every_bit_is_that_of_the_unbroken_run(
    launcher: Launcher, unbroken: dict[str, Any]
) -> None:
    at = random.SystemRandom().randint(5, 11)
    process = launcher.start(TWO, "killed")
    metrics = launcher.folder / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < at:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    kill_everything(process)
    recorded, saved = len(launcher.metrics("killed")), max(complete_steps(metrics.parent / "checkpoints"))
    assert at <= recorded < STEPS and saved <= recorded, "the run should have been killed on its way"

    result = launcher.run(TORCHRUN, "killed")
    where = f"killed after step {recorded}, resumed from {saved}"
    assert result["steps"] == STEPS
    assert exact(launcher.metrics("killed")) == exact(launcher.metrics("unbroken")), where
    assert [step["step"] for step in launcher.metrics("killed")] == list(range(1, STEPS + 1))
    step, expected = launcher.state("unbroken")
    resumed_step, found = launcher.state("killed")
    assert (step, resumed_step) == (STEPS, STEPS)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == [], where
    assert any(name.endswith("gate.bias") and bool(tensor.any()) for name, tensor in found.items())
    log = (metrics.parent / "logs" / "rank-0.log").read_text()
    assert f"resumed from runs/killed/checkpoints/step-{saved}" in log


def test_a_single_process_gives_the_same_within_rounding(
    launcher: Launcher, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.run_here(monkeypatch, "alone", "train.steps=7")
    for one, other in zip(launcher.metrics("alone"), launcher.metrics("unbroken")[:7], strict=True):
        assert all(relative(one[name], other[name]) < 1e-5 for name in NUMBERS)
    assert relative(one["validation_loss"], other["validation_loss"]) < 1e-5


def test_a_finished_run_is_not_trained_again(
    launcher: Launcher,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = launcher.metrics("unbroken")
    launcher.run_here(monkeypatch, "unbroken")
    console = capfd.readouterr()
    assert json.loads(console.out.splitlines()[-1]) == unbroken
    assert "already complete: raise train.steps to continue, or start again with --fresh" in console.err
    assert launcher.metrics("unbroken") == before
