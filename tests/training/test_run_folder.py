"""Run folders: one run at a time, from the same point on every rank, in the place that the user named."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.configs.config import Config
from counterflow.launcher.bootstrap import Process
from counterflow.launcher.commands.train import check_same_run
from counterflow.plan.steps import Progress
from counterflow.settings import UsageError
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import tiny
from counterflow.training.preflight import prepare_run
from counterflow.training.run_folder import locked, move_aside

HOLD = """
import sys, time
from pathlib import Path
from counterflow.training.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    refusal = f"another process is training into {run}: wait for it, stop it, or set run.name"
    with locked(run):
        with pytest.raises(UsageError, match=refusal), locked(run, patience=0.2):
            pytest.fail("two runs hold the folder")
        with locked(run.with_name("other"), patience=0.0):
            pass
    with locked(run, patience=0.0):
        pass


def test_a_lock_ends_with_the_run_however_it_ends(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "mine"):
        _ = 1 / 0
    with locked(tmp_path / "mine", patience=0.0):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(tmp_path / "mine")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process is training into"), locked(tmp_path / "mine", 0.2):
            pytest.fail("two processes hold the folder")
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path / "mine", patience=0.2):
        pass


def test_a_run_moved_aside_is_still_locked(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    with locked(run):
        aside = move_aside(run)
        assert aside is not None and aside.exists() and not run.exists()
        with pytest.raises(UsageError), locked(run, patience=0.0):
            pytest.fail("two runs hold the folder")


def test_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was just killed may take a moment to end."""
    first = locked(tmp_path / "mine")
    first.__enter__()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            first.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", nap)
    with locked(tmp_path / "mine", patience=60.0):
        assert len(naps) == 2


def _verdict(worker: Worker, config: Config, odd_rank: int, changes: dict[str, Any]) -> str:
    """Message of a rank when one rank has another text or checkpoint."""
    run_plan = prepare_run(config, worker.world_size, worker.world_size, Path(config.run.dir) / "cache")
    if worker.rank == odd_rank:
        digest = changes.get("digest", run_plan.data.digest)
        others = {name: value for name, value in changes.items() if name != "digest"}
        run_plan = replace(run_plan, data=replace(run_plan.data, digest=digest), **others)
    try:
        ranks = worker.rank, worker.world_size
        check_same_run(run_plan, Process(*ranks, *ranks, torch.device("cpu")))
    except UsageError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("odd_rank", "changes", "said"),
    [
        (1, {"digest": "0123456789abcdef"}, "rank 1 and rank 0 disagree on the text: 0123456789ab and "),
        (0, {"digest": "0123456789abcdef"}, "rank 1 and rank 0 disagree on the text: "),
        (1, {"progress": Progress(10)}, "rank 1 and rank 0 disagree on the step to continue from: 10 and 0; "),
        (1, {"total_steps": 7}, "rank 1 and rank 0 disagree on the last step: 7 and 20; "),
        (1, {}, "agreed"),
    ],
)
def test_ranks_that_see_another_text_or_checkpoint_do_not_start(
    pool: Pool, text: Path, tmp_path: Path, odd_rank: int, changes: dict[str, Any], said: str
) -> None:
    for verdict in pool.run(_verdict, 2, tiny(text, f"run.dir={tmp_path}"), odd_rank, changes):
        assert verdict.startswith(said)


def test_a_tilde_is_the_users_home(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(text.parent))
    monkeypatch.chdir(tmp_path)
    run_plan = prepare_run(tiny(text, "run.dir=~/x", f"data.path=~/{text.name}"), 1, 1, tmp_path)
    assert run_plan.run_dir == text.parent / "x" / "tiny"
    assert run_plan.data.digest == prepare_run(tiny(text), 1, 1, tmp_path).data.digest


def test_tokenised_text_is_kept_in_the_configured_folder_or_else_in_the_callers(text: Path, tmp_path: Path) -> None:
    configured, given = tmp_path / "configured", tmp_path / "given"
    prepare_run(tiny(text, f"data.cache_dir={configured}"), 1, 1, given)
    assert list(configured.iterdir()) and not given.exists()
    prepare_run(tiny(text, "data.cache_dir=null"), 1, 1, given)
    assert list(given.iterdir())
