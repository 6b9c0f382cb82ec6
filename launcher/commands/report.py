"""`counterflow report RUN`: measurements of a run, from its run folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...report.metrics import METRICS_FILE, StepMetrics, read_metrics
from ...report.text.run import run_figures, run_text
from ...settings import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path, help="a run folder, such as runs/smoke")
    parser.add_argument("--last", type=int, metavar="STEPS", help="report the last STEPS steps only (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises UsageError where no step is recorded."""
    steps = _steps(args.run, args.last)
    print(json.dumps(run_figures(steps), indent=2) if args.json else run_text(args.run, steps))
    return 0


def _steps(folder: Path, last: int | None) -> list[StepMetrics]:
    if last is not None and last < 1:
        raise UsageError(f"--last is {last}: it must be at least 1")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give that of a run, such as runs/NAME")
    if not (folder / METRICS_FILE).is_file():
        raise UsageError(f"{folder} has no {METRICS_FILE}: give the folder of a run, such as runs/NAME")
    try:
        steps = list(read_metrics(folder))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not steps:
        raise UsageError(f"{folder / METRICS_FILE} records no step yet")
    return steps if last is None else steps[-last:]
