"""Programs of `examples/` run as their first lines say, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import counterflow

EXAMPLES = Path(counterflow.__file__).parent / "examples"


def run_example(name: str, folder: Path) -> str:
    """Run an example with this Python, in an empty folder, and return what it printed."""
    command = [sys.executable, "-P", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_steps_from_python_lower_the_loss(tmp_path: Path) -> None:
    printed = run_example("first_steps.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d  loss (\S+)", printed, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert "validation loss" in printed


def test_own_schedule_is_checked_simulated_drawn_and_trains_as_one_process_does(tmp_path: Path) -> None:
    printed = run_example("own_schedule.py", tmp_path)
    assert re.search(r"^groups of 4 +step 42, bubble 43%, at most 4 micro-batches on a rank$", printed, re.MULTILINE)
    assert "groups of 4: 4 ranks, 4 stages, 8 micro-batches" in printed
    pairs = re.findall(r"^step \d: loss (\S+) on two pipeline ranks, (\S+) in one process$", printed, re.MULTILINE)
    assert len(pairs) == 3
    for pipeline, alone in pairs:
        assert float(pipeline) == pytest.approx(float(alone), rel=1e-5)


def test_every_example_has_a_test_and_says_how_to_run_it() -> None:
    examples = sorted(path.name for path in EXAMPLES.glob("*.py"))
    source = Path(__file__).read_text("utf-8")
    for name in examples:
        assert f'run_example("{name}"' in source
        assert f"    .venv/bin/python -P examples/{name}\n" in (EXAMPLES / name).read_text("utf-8")
