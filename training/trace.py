"""Trace of the pipeline in a step: the measured times of every action, drawn above the same step simulated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from ..parallel.groups import Groups
from ..parallel.schedule.simulate import simulate
from ..parallel.schedule.timeline import Span, Timeline
from ..plan.measured import measured_costs
from ..report.pages.timeline import draw_html
from ..report.text.numbers import number, share
from ..report.traffic import HEADER, Sent, traffic_table
from .trainer import PipelineRun

MILLISECONDS = 1e3
ROUNDS = 5  # barriers before all clocks are read at about the same moment


@dataclass(frozen=True)
class PipelineTrace:
    """A step as it ran on the first pipeline, and its schedule simulated with the costs measured in that step."""

    measured: Timeline
    simulated: Timeline

    def describe(self) -> str:
        """Return a summary of both in one line."""
        measured, simulated = self.measured, self.simulated
        return (
            f"pipeline {measured.schedule.name}: measured {number(measured.step_time)} ms with "
            f"{share(measured.bubble_fraction)} bubble, its schedule with the same actions "
            f"{number(simulated.step_time)} ms with {share(simulated.bubble_fraction)}"
        )

    def write(self, path: Path, step: int, traffic: Sequence[Sent] = ()) -> None:
        """Draw both as a page, with the traffic of the step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        timelines = [("measured", self.measured), ("simulated with the measured costs", self.simulated)]
        notes = ["Forward and backward of all micro-batches, without reading the batch and without the optimizer."]
        tables = [("Traffic of the step, all ranks", [HEADER, *traffic_table(traffic)])] if traffic else []
        path.write_text(draw_html(timelines, "ms", notes, title=f"Step {step}", tables=tables), encoding="utf-8")


def gather_trace(groups: Groups, run: PipelineRun) -> PipelineTrace | None:
    """Trace of a run, on rank 0, of the pipeline that rank 0 is in; None elsewhere. Every rank of the grid calls it."""
    at = groups.coordinates
    if at.edp or at.ep:
        return None
    offset = _clock_offset(groups.pp)
    times_here = [(span.start - offset, span.end - offset) for span in run.spans]
    of_ranks: list[Any] | None = [None] * groups.layout.pp if at.pp == 0 else None
    dist.gather_object((times_here, run.program.peak_microbatches), of_ranks, group=groups.pp, group_dst=0)
    if of_ranks is None:
        return None
    first = min(start for times, _ in of_ranks for start, _ in times)
    measured = Timeline(
        run.schedule,
        tuple(
            tuple(
                Span(action, (start - first) * MILLISECONDS, (end - first) * MILLISECONDS)
                for action, (start, end) in zip(actions, times, strict=True)
            )
            for actions, (times, _) in zip(run.schedule.actions, of_ranks, strict=True)
        ),
        tuple(peak for _, peak in of_ranks),
    )
    return PipelineTrace(measured, simulate(run.schedule, measured_costs(measured)))


def _clock_offset(group: dist.ProcessGroup) -> float:
    """Seconds that this rank's clock is ahead of the first rank's, accurate to about the time of a barrier."""
    ahead = []
    for _ in range(ROUNDS):
        dist.barrier(group)
        times: list[Any] = [None] * group.size()
        dist.all_gather_object(times, time.perf_counter(), group=group)
        ahead.append(times[group.rank()] - times[0])
    return median(ahead)
