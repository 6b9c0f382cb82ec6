"""`counterflow train` with a pipeline, in real processes: its output, a schedule from a file, a rank that dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from counterflow.launcher.cli import main
from counterflow.launcher.environment import PARENT_VARIABLE, RANK_VARIABLES
from counterflow.tests.training.harness import settings

SCHEDULE = """
from counterflow.parallel.schedule.actions import Action, Schedule

def all_forwards_first(num_ranks, num_microbatches, *, backwards_in_order=True):
    numbers = list(range(num_microbatches))
    back = numbers if backwards_in_order else numbers[::-1]
    actions = [
        (*(Action("F", rank, i) for i in numbers), *(Action("B", rank, i) for i in back)) for rank in range(num_ranks)
    ]
    placement = tuple((rank,) for rank in range(num_ranks))
    return Schedule("mine", num_ranks, num_ranks, num_microbatches, placement, tuple(actions))
"""
PATIENCE = 300.0  # seconds, on a busy machine; half of the default of parallel.timeout


def start(folder: Path, text: Path, *overrides: str) -> subprocess.Popen[str]:
    given = [*settings(text), "parallel.pp=2", "model.num_hidden_layers=4", "log.peak_tflops=0.1", *overrides]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "counterflow", "train", "tiny", "--nproc", "2", "--json"]
        + [f"--set={each}" for each in given],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_prints_its_split_and_draws_its_third_step(tmp_path: Path, text: Path) -> None:
    """The schedule is a function in the user's file."""
    (tmp_path / "mine.py").write_text(SCHEDULE)
    schedule = ("parallel.schedule=mine.py:all_forwards_first", "parallel.schedule_options.backwards_in_order=false")
    process = start(tmp_path, text, "train.steps=4", *schedule)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 4
    assert re.search(r"stage +ranks +layers +besides layers +parameters +cost", err)
    assert re.search(r"^ +1 +1 +\S+ +head, 1 MTP module", err, re.MULTILINE)
    page = tmp_path / "runs" / "tiny" / "traces" / "step-3.html"
    said = re.search(r"step 3: pipeline mine: measured ([\d.]+) ms with [\d.]+% bubble, .* drawn in (\S+)", err)
    assert said is not None and (tmp_path / said[2]).samefile(page)
    drawn = page.read_text("utf-8")
    assert "measured" in drawn and "simulated with the measured costs" in drawn
    assert float(said[1]) > 0
    assert "http://" not in drawn and "https://" not in drawn


def test_a_rank_that_is_killed_ends_the_run_with_its_name(tmp_path: Path, text: Path) -> None:
    process = start(tmp_path, text, "train.steps=100000", "checkpoint.every=100000", "parallel.schedule=dualpipe")
    try:
        log = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        ranks = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
        next(child for child in ranks if child.environ().get("RANK") == "1").kill()
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "rank 1" in err and "SIGKILL" in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.pp=3", "parallel.schedule=dualpipe"], "even"),
        (["parallel.pp=8"], "above the 4 of model.num_hidden_layers"),
        (["parallel.split=[1,2]"], "3 layers"),
        (["batch.global_sequences=7", "batch.micro_sequences=2", "parallel.dp=1"], "nearest"),
        (["parallel.schedule=dualpip"], "dualpipe"),
        (["parallel.overlap_order=[F.attention,experts]"], "experts"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in (*RANK_VARIABLES, PARENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    given = [*settings(text), "parallel.pp=2", "model.num_hidden_layers=4", "train.steps=2", *overrides]
    with mock.patch("counterflow.launcher.local_launch.elastic_launch", side_effect=AssertionError("ranks started")):
        assert main(["train", "tiny", "--nproc", "2", "--json", *(f"--set={each}" for each in given)]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
