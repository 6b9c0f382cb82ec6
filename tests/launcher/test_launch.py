"""Launched processes, real ones: their start, their output on the console, their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from counterflow.launcher.environment import usable_cores
from counterflow.launcher.local_launch import launch_local
from counterflow.settings import UsageError

WORKER = str(Path(__file__).with_name("launch_worker.py"))
PATIENCE = 300.0  # seconds, on a busy machine


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "run" / "logs"


def wait_until(condition: Callable[[], bool], event: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {event}"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_join_one_group_and_only_rank_0_has_the_console(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(3, [WORKER, "agree", str(logs), "collective"], logs) == 0
    console = capfd.readouterr()
    assert console.out == "printed by 0\nrank 0 of 3 sees the sum 6.0\n"
    assert console.err == "logged by 0\n"
    for rank in range(3):
        log = (logs / f"rank-{rank}.log").read_text()
        assert f"[rank {rank}] INFO counterflow.test: logged by {rank}" in log
        assert f"from C++ on {rank}" in log
        assert (f"rank {rank} of 3 sees the sum 6.0" in log) == (rank > 0)


def test_first_failure_is_shown_and_its_consequences_are_not(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(3, [WORKER, "raise", str(logs), "collective"], logs) == 1
    printed = capfd.readouterr().err.removeprefix("logged by 0\n")
    assert printed.startswith("rank 1 failed:\nTraceback (most recent call last):\n")
    assert "in misbehave" in printed
    assert printed.endswith(f"ArithmeticError: the cause\nfull log of rank 1: {logs / 'rank-1.log'}\n")
    assert printed.count("Traceback") == 1
    assert "ArithmeticError: the cause" in (logs / "rank-1.log").read_text()


def test_killed_rank_is_named_with_its_signal(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(3, [WORKER, "kill", str(logs), "collective"], logs) == 1
    printed = capfd.readouterr().err.removeprefix("logged by 0\n")
    assert printed.startswith("rank 1 was killed by SIGKILL")
    assert "logged by 1" in printed
    assert "Traceback" not in printed


def test_aborted_rank_is_shown_with_its_own_last_lines(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(2, [WORKER, "abort", str(logs)], logs) == 1
    printed = capfd.readouterr().err.removeprefix("logged by 0\n")
    assert printed.startswith("rank 1 was killed by SIGABRT (C++ code gave up, as NCCL's watchdog does")
    assert "Watchdog caught collective operation timeout\n  Fatal Python error: Aborted\n" in printed
    assert "most recent call first" not in printed and "most recent call first" in (logs / "rank-1.log").read_text()


def test_a_failed_rank_of_any_other_launcher_ends_at_once_and_says_why() -> None:
    code = (
        "import os, threading, time\n"
        "from counterflow.launcher.environment import read_environment\n"
        "from counterflow.launcher.failures import supervised\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()  # as NCCL's own at the end of Python\n"
        "with supervised(read_environment(os.environ)):\n"
        "    raise ArithmeticError('the cause')\n"
    )
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")} | ranks
    ended = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert ended.stderr.startswith("rank 3 failed:\nTraceback") and "ArithmeticError: the cause" in ended.stderr


def test_usage_error_of_a_worker_is_raised_here_and_nothing_printed(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"^data\.path is missing: set it$"):
        launch_local(2, [WORKER, "usage", str(logs)], logs)
    assert capfd.readouterr().err.removeprefix("logged by 0\n") == ""


def test_failure_before_the_log_is_open_is_shown_and_leaves_no_folder(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch_local(2, [WORKER, "early", str(logs)], logs) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("rank 1 failed:\nTraceback")
    assert printed.endswith("ArithmeticError: the cause\n")
    assert not logs.exists()


def test_failure_without_a_record_is_shown_by_its_last_lines(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(2, [WORKER, "break", str(logs)], logs) == 1
    printed = capfd.readouterr().err.removeprefix("logged by 0\n")
    assert printed.startswith("rank 1 ended with exit code 1")
    assert printed.endswith("ImportError: before it is supervised\n")


@pytest.mark.parametrize("chosen", [None, "7"])
def test_threads_are_divided_unless_the_user_chose(
    logs: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert launch_local(2, [WORKER, "agree", str(logs)], logs) == 0
    threads = {json.loads((logs / f"here-{rank}").read_text())["threads"] for rank in range(2)}
    assert threads == {chosen or str(max(1, usable_cores() // 2))}
    assert os.environ.get("OMP_NUM_THREADS") == chosen


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["ctrl-c", "terminate", "kill-9"],
)
def test_no_worker_outlives_its_launcher(logs: Path, number: signal.Signals, exit_code: int) -> None:
    code = (
        "import sys, pathlib, signal; from counterflow.launcher.local_launch import launch_local\n"
        # A shell starts background jobs with SIGINT ignored. Tests that run in one would hand that down.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(launch_local(2, [{WORKER!r}, 'wait', {str(logs)!r}], pathlib.Path({str(logs)!r})))"
    )
    launcher = subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        files = [logs / f"here-{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.stat().st_size for file in files), "workers to start")
        workers = [json.loads(file.read_text())["pid"] for file in files]
        launcher.send_signal(number)
        _, printed = launcher.communicate(timeout=PATIENCE)
        wait_until(lambda: all(map(is_gone, workers)), "workers to end")
    finally:
        launcher.kill()
    assert launcher.returncode == exit_code
    assert printed == "logged by 0\n"


def test_torchrun_shows_the_cause_and_not_its_consequences(logs: Path) -> None:
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, WORKER, "raise", str(logs), "collective"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "printed by 0" in done.stdout
    assert "printed by 1" not in done.stdout
    assert "ArithmeticError: the cause" in done.stderr
    assert "in misbehave" in done.stderr
    assert "gloo" not in done.stderr
    assert "printed by 1" in (logs / "rank-1.log").read_text()
