"""`counterflow report RUN`: what a run measured, from its run folder."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...report.metrics import METRICS_FILE, StepMetrics, read_metrics
from ...report.text.numbers import format_count, format_duration
from ...report.text.table import align
from ...report.traffic import HEADER, mean_step, traffic_table
from ...settings import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path, help="a run folder, such as runs/smoke")
    parser.add_argument("--last", type=int, metavar="STEPS", help="only the last so many steps; by default all")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises UsageError where there is nothing to report of."""
    steps = _steps(args.run, args.last)
    if args.json:
        print(json.dumps(_as_json(steps), indent=2))
    else:
        print("\n".join(_as_text(args.run, steps)))
    return 0


def _steps(folder: Path, last: int | None) -> list[StepMetrics]:
    if last is not None and last < 1:
        raise UsageError(f"--last is {last}: it must be at least 1")
    if not (folder / METRICS_FILE).is_file():
        raise UsageError(f"{folder} has no {METRICS_FILE}: give the folder of a run, such as runs/NAME")
    try:
        steps = list(read_metrics(folder))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not steps:
        raise UsageError(f"{folder / METRICS_FILE} records no step yet")
    return steps if last is None else steps[-last:]


def _as_json(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    mean = mean_step([step.traffic for step in steps if step.traffic is not None])
    return {
        "first_step": steps[0].step,
        "last_step": steps[-1].step,
        "loss": steps[-1].loss,
        "validation_loss": _last(steps, "validation_loss"),
        "tokens_per_second": statistics.median(step.tokens_per_second for step in steps),
        "step_seconds": statistics.median(step.step_seconds for step in steps),
        "mfu": None if steps[-1].mfu is None else statistics.median(step.mfu or 0.0 for step in steps),
        "max_vio": steps[-1].max_vio,
        "rank_vio": steps[-1].rank_vio,
        "traffic": [sent.model_dump() for sent in mean],
    }


def _as_text(folder: Path, steps: Sequence[StepMetrics]) -> list[str]:
    found = _as_json(steps)
    rows = {"steps": f"{found['first_step']} to {found['last_step']}", "loss": f"{found['loss']:.4f}"}
    if found["validation_loss"] is not None:
        rows["validation loss"] = f"{found['validation_loss']:.4f}"
    rows["time"] = format_duration(sum(step.step_seconds for step in steps))
    rows["speed"] = f"{format_count(found['tokens_per_second'])} tok/s, median of the steps"
    if found["mfu"] is not None:
        rows["MFU"] = f"{found['mfu']:.1%}"
    if found["max_vio"] is not None:
        rows["MaxVio"] = f"{found['max_vio']:.2f}, mean of the layers in the last step"
    if found["rank_vio"] is not None:
        rows["busiest rank"] = f"{1 + found['rank_vio']:.2f} x the mean, likewise"
    width = max(map(len, rows))
    lines = [str(folder), *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
    mean = mean_step([step.traffic for step in steps if step.traffic is not None])
    if mean:
        lines += ["", "Sent in a step by all ranks, payload, mean of the steps"]
        lines += align([HEADER, *traffic_table(mean)], frozenset({0, 1}))
    return lines


def _last(steps: Sequence[StepMetrics], field: str) -> float | None:
    values = [getattr(step, field) for step in steps if getattr(step, field) is not None]
    return values[-1] if values else None
