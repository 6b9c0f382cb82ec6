"""What the pipeline did in a step: the measured times of every action, drawn above the same step simulated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from ..parallel.executor import Program
from ..parallel.groups import Groups
from ..parallel.schedule.actions import Schedule
from ..parallel.schedule.measured import measured_costs
from ..parallel.schedule.simulate import simulate
from ..parallel.schedule.timeline import Span, Timeline
from ..report.pages.timeline import draw_html
from ..report.text.numbers import number, share
from ..report.traffic import HEADER, Sent, traffic_table

MILLISECONDS = 1e3
ROUNDS = 5  # of barriers, after which all clocks are read at about the same moment


@dataclass(frozen=True)
class PipelineTrace:
    """A step as it ran on the first pipeline, and its schedule simulated with the costs that were measured in it."""

    measured: Timeline
    simulated: Timeline

    def describe(self) -> str:
        """Both in a line."""
        measured, simulated = self.measured, self.simulated
        return (
            f"pipeline {measured.schedule.name}: measured {number(measured.step_time)} ms with "
            f"{share(measured.bubble_fraction)} bubble, its schedule with the same actions "
            f"{number(simulated.step_time)} ms with {share(simulated.bubble_fraction)}"
        )

    def write(self, path: Path, step: int, traffic: Sequence[Sent] = ()) -> None:
        """Draw both as a page, with what the step sent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        timelines = [("measured", self.measured), ("simulated with the measured costs", self.simulated)]
        notes = ["Forward and backward of all micro-batches, without reading the batch and without the optimizer."]
        tables = [("Traffic of the step, all ranks", [HEADER, *traffic_table(traffic)])] if traffic else []
        path.write_text(draw_html(timelines, "ms", notes, title=f"Step {step}", tables=tables), encoding="utf-8")


def gather_trace(groups: Groups, schedule: Schedule, program: Program, spans: list[Span]) -> PipelineTrace | None:
    """The last step on the pipeline of rank 0, there; None elsewhere. Every rank of the grid calls it."""
    place = groups.coordinates
    if place.edp or place.ep:
        return None
    offset = _clock_offset(groups.pp)
    mine = [(position, span.start - offset, span.end - offset) for position, span in enumerate(spans)]
    everyone: list[Any] | None = [None] * groups.layout.pp if place.pp == 0 else None
    dist.gather_object((mine, program.peak_microbatches), everyone, group=groups.pp, group_dst=0)
    if everyone is None:
        return None
    first = min(start for times, _ in everyone for _, start, _ in times)
    measured = Timeline(
        schedule,
        tuple(
            tuple(
                Span(actions[i], (start - first) * MILLISECONDS, (end - first) * MILLISECONDS)
                for i, start, end in times
            )
            for actions, (times, _) in zip(schedule.actions, everyone, strict=True)
        ),
        tuple(peak for _, peak in everyone),
    )
    return PipelineTrace(measured, simulate(schedule, measured_costs(measured)))


def _clock_offset(group: dist.ProcessGroup) -> float:
    """How far this rank's clock is ahead of the first rank's, in seconds, to about the time of a barrier."""
    ahead = []
    for _ in range(ROUNDS):
        dist.barrier(group)
        times: list[Any] = [None] * group.size()
        dist.all_gather_object(times, time.perf_counter(), group=group)
        ahead.append(times[group.rank()] - times[0])
    return median(ahead)
