"""Text that `counterflow report` prints about a run, and the same figures as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import StepMetrics
from ..traffic import HEADER, Sent, mean_step, traffic_table
from .lines import name_rows
from .numbers import format_count, format_duration
from .table import align


def run_text(folder: Path, steps: Sequence[StepMetrics]) -> str:
    """Report of `steps` of the run in `folder`: rows of a name and a text, then what the ranks sent."""
    figures = run_figures(steps)
    rows = {"steps": f"{figures['first_step']} to {figures['last_step']}", "loss": f"{figures['loss']:.4f}"}
    if figures["validation_loss"] is not None:
        rows["validation loss"] = f"{figures['validation_loss']:.4f}"
    rows["time"] = format_duration(sum(step.step_seconds for step in steps))
    rows["speed"] = f"{format_count(figures['tokens_per_second'])} tok/s, median of the steps"
    if figures["mfu"] is not None:
        rows["MFU"] = f"{figures['mfu']:.1%}"
    if figures["max_vio"] is not None:
        rows["MaxVio"] = f"{figures['max_vio']:.2f}, mean of the layers in the last step"
    if figures["rank_vio"] is not None:
        rows["busiest rank"] = f"{1 + figures['rank_vio']:.2f} x the mean, likewise"
    lines = [str(folder), *name_rows(rows)]
    mean = _mean_traffic(steps)
    if mean:
        lines += ["", "Sent in a step by all ranks, payload, mean of the steps"]
        lines += align([HEADER, *traffic_table(mean)], frozenset({0, 1}))
    return "\n".join(lines)


def run_figures(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """Figures of `steps` for `--json`: losses and balance of the last step, medians of speed, mean traffic."""
    last = steps[-1]
    return {
        "first_step": steps[0].step,
        "last_step": last.step,
        "loss": last.loss,
        "validation_loss": next((s.validation_loss for s in reversed(steps) if s.validation_loss is not None), None),
        "tokens_per_second": statistics.median(step.tokens_per_second for step in steps),
        "step_seconds": statistics.median(step.step_seconds for step in steps),
        "mfu": None if last.mfu is None else statistics.median(step.mfu or 0.0 for step in steps),
        "max_vio": last.max_vio,
        "rank_vio": last.rank_vio,
        "traffic": [sent.model_dump() for sent in _mean_traffic(steps)],
    }


def _mean_traffic(steps: Sequence[StepMetrics]) -> list[Sent]:
    return mean_step([step.traffic for step in steps if step.traffic is not None])
