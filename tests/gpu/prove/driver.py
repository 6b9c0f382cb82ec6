"""Runs of all parts, each in a process of its own with a time limit, and the page of their results.

The parent imports everything once, starts no CUDA and forks a child for each part: a crash, a hang or a broken CUDA
context ends one part alone. A child leads a process group, so that ranks which it has started end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup


@dataclass(frozen=True)
class Part:
    """One part of the proof. Its function gets the set-up and the report, and raises what it cannot handle."""

    name: str
    about: str
    seconds: float
    """Time limit."""
    run: Callable[[Setup, Report], None]


def run_part(part: Part, setup: Setup, seconds: float = float("inf")) -> dict[str, Any]:
    """Run `part` in a child for at most `seconds`; returns its results, whatever became of it."""
    report, limit = Report(setup.out, part.name, part.about), min(part.seconds, seconds)
    if limit <= 0:
        report.finish("skipped", "no time was left")
        return report.data
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(part, setup, report)
    with contextlib.suppress(OSError):  # the child has done so itself, or is gone
        os.setpgid(child, child)
    status = _wait(child, limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # ranks that are left over
    if status is None:
        os.waitpid(child, 0)
    data: dict[str, Any] = json.loads(report.path.read_text(encoding="utf-8"))
    if data["status"] == "running":
        report.data = data
        if status is None:
            report.finish("timed out", f"was stopped after {limit:.0f} s")
        else:
            report.finish("crashed", f"ended with {_in_words(status)}")
        data = report.data
    return data


def _in_child(part: Part, setup: Setup, report: Report) -> None:
    try:
        os.setpgid(0, 0)
        log = os.open(setup.out / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        try:
            part.run(setup, report)
        except BaseException as error:
            report.finish("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}")
        else:
            report.finish()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _wait(child: int, seconds: float) -> int | None:
    """Exit status of the child; None if it runs for longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    return None


def _in_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"status {os.waitstatus_to_exitcode(status)}"


def run_all(parts: Sequence[Part], setup: Setup, seconds: float = float("inf")) -> bool:
    """Run all parts in order within `seconds`, writing the page after each; returns whether all have passed."""
    results, end = [], time.monotonic() + seconds
    for part in parts:
        print(f"{part.name} … ", end="", flush=True)
        results.append(run_part(part, setup, end - time.monotonic()))
        last = results[-1]
        failed = [check["check"] for check in last["checks"] if not check["holds"]]
        more = f": {'; '.join(failed)}" if failed else f": {last['error'].splitlines()[0]}" if last["error"] else ""
        print(f"{last['status']} in {last['seconds']:.1f} s{more}", flush=True)
        (setup.out / "index.md").write_text(page(results, setup), encoding="utf-8")
    return all(result["status"] == "passed" for result in results)


def page(results: Sequence[dict[str, Any]], setup: Setup) -> str:
    """One page with all results, in Markdown."""
    title = "Rehearsal of the GPU proof on a CPU" if setup.rehearse else "GPU proof"
    lines = [f"# {title}", "", "| part | status | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| [{r['part']}](#{r['part']}) | {r['status']} | {r['seconds']:.1f} | {r['about']} |" for r in results]
    for result in results:
        lines += ["", f"## {result['part']}", "", f"{result['about']}: {result['status']}."]
        if result["error"]:
            lines += ["", "```", result["error"].rstrip(), "```"]
        if result["checks"]:
            lines += ["", "| check | holds | seen |", "| --- | --- | --- |"]
            lines += [
                f"| {c['check']} | {'yes' if c['holds'] else '**no**'} | {_cell(c['seen'])} |" for c in result["checks"]
            ]
        if result["numbers"]:
            lines += ["", "| figure | |", "| --- | --- |"]
            lines += [f"| {name} | {_cell(value)} |" for name, value in result["numbers"].items()]
        for name, rows in result["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["", f"### {name}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
