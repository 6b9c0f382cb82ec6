"""The GPU proof: parts that end in their own ways while the others run on, and the record of what has run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from counterflow.tests.gpu.prove.driver import Part, run_all
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.run import PARTS
from counterflow.tests.gpu.prove.table import NOTHING, PAGE, proof_table, with_table
from counterflow.tests.gpu.prove.tools import Setup

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def passes(setup: Setup, report: Report) -> None:
    report.number("device", setup.device)
    report.row("table", a=1, b=float("nan"))
    report.check("one is one", True, 1)


def fails(setup: Setup, report: Report) -> None:
    with report.attempt("division"):
        report.number("never", 1 / 0)
    report.check("later checks still run", True)


def raises(setup: Setup, report: Report) -> None:
    report.number("before", 1)
    raise RuntimeError("a reason")


def hangs(setup: Setup, report: Report) -> None:
    if os.fork() == 0:
        time.sleep(600)  # a rank that would stay behind
    report.number("child", "started")
    time.sleep(600)


def crashes(setup: Setup, report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def results(tmp_path: Path) -> dict[str, dict[str, object]]:
    functions = (passes, fails, raises, crashes, hangs, passes)
    parts = [Part(f"{n}_{f.__name__}", "a part", 1.0 if f is hangs else 30.0, f) for n, f in enumerate(functions)]
    assert not run_all(parts, Setup(tmp_path, rehearse=True))
    return {part.name: json.loads((tmp_path / f"{part.name}.json").read_text(encoding="utf-8")) for part in parts}


def test_parts_fail_alone_and_say_how(results: dict[str, dict[str, object]], tmp_path: Path) -> None:
    statuses = {name: result["status"] for name, result in results.items()}
    assert statuses == {
        "0_passes": "passed",
        "1_fails": "failed",
        "2_raises": "error",
        "3_crashes": "crashed",
        "4_hangs": "timed out",
        "5_passes": "passed",
    }
    assert "a reason" in str(results["2_raises"]["error"])
    assert "SIGKILL" in str(results["3_crashes"]["error"])
    assert results["4_hangs"]["numbers"] == {"child": "started"}, "what was known before the end is kept"
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert all(name in page for name in results)
    assert "ZeroDivisionError" in page


def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    assert not run_all([Part("late", "a part", 30.0, passes)], Setup(tmp_path, rehearse=True), seconds=0.0)
    assert json.loads((tmp_path / "late.json").read_text(encoding="utf-8"))["status"] == "skipped"


def test_the_page_says_what_has_run_on_a_gpu(root: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, proof_table()), "python -P tests/gpu/prove/table.py writes the table again"
    recorded = [run for run in (root / "docs" / "proofs").iterdir() if run.is_dir()]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert (NOTHING in page) == (not recorded) == ("On a GPU nothing has run so far" in readme)
    assert all(f"| `{part.name}` |" in page for part in PARTS), "every part is described"


def test_recorded_runs_are_rows_of_the_table(tmp_path: Path) -> None:
    run = tmp_path / "2027-01-31-h200"
    assert proof_table(tmp_path) == NOTHING
    run.mkdir()
    run_all([Part("environment", "a part", 30.0, passes), Part("other", "a part", 30.0, fails)], Setup(run, True))
    table = proof_table(tmp_path)
    assert "[2027-01-31-h200](proofs/2027-01-31-h200/index.md)" in table
    assert "| 1 of 2 | other (failed) |" in table
    assert with_table(f"a<!-- proofs -->\n{NOTHING}<!-- end of proofs -->b", table).startswith(
        f"a<!-- proofs -->\n{table}"
    )
