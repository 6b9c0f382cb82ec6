"""A pipeline schedule of your own: checked, simulated, drawn, and trained on two local processes.

    .venv/bin/python -P examples/own_schedule.py

A schedule is a function `(num_ranks, num_microbatches, *, options...) -> Schedule`. No other code has to change:
sends and receives follow from the actions. The last part trains three steps and asserts the losses of one process.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from counterflow.launcher import cli
from counterflow.parallel.schedule.actions import Action, Schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.one_f_one_b import one_f_one_b
from counterflow.parallel.schedule.simulate import simulate
from counterflow.report.text.timeline import draw_text

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs"


def grouped(num_ranks: int, num_microbatches: int, *, group: int = 4) -> Schedule:
    """Micro-batches in groups, each group as in GPipe: all its forwards, then all its backwards.

    Each rank has one stage. A rank holds `group` micro-batches at most, and every group pays a bubble of its own.
    """
    actions = []
    for rank in range(num_ranks):
        order = []
        for first in range(0, num_microbatches, group):
            members = range(first, min(first + group, num_microbatches))
            order += [Action("F", rank, m) for m in members]
            order += [Action("B", rank, m) for m in reversed(members)]
        actions.append(tuple(order))
    return Schedule(
        name=f"groups of {group}",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        stages_of_rank=tuple((rank,) for rank in range(num_ranks)),
        actions=tuple(actions),
    )


def compare(num_ranks: int = 4, num_microbatches: int = 8) -> None:
    """Check and simulate the schedule and 1F1B, and draw a timeline. F, I and W take one unit of time each."""
    costs = Costs.uniform(num_ranks)
    schedules = [grouped(num_ranks, num_microbatches, group=size) for size in (2, 4, 8)]
    for schedule in (*schedules, one_f_one_b(num_ranks, num_microbatches)):
        held = max(check(schedule).peak)  # ScheduleError names rank, position and action where it cannot run
        timeline = simulate(schedule, costs)
        print(
            f"{schedule.name:11} step {timeline.step_time:g}, bubble {timeline.bubble_fraction:.0%}, "
            f"at most {held} micro-batches on a rank"
        )
    print(draw_text(simulate(schedules[1], costs)))


def train(folder: Path, name: str, arguments: Sequence[str]) -> list[float]:
    """Train `tiny` for three steps by the `counterflow` command, and return the losses from its metrics."""
    keys = [
        f"run.name={name}",
        f"run.dir={folder}",
        "run.device=cpu",
        "data.source=folder",
        f"data.path={DOCUMENTATION}",
        f"data.cache_dir={folder / 'cache'}",
        "train.steps=3",
        "log.tensorboard=false",
        "log.peak_tflops=1",  # MFU is of no interest here, so the machine's peak need not be measured
    ]
    command = ["train", "tiny", *arguments, *(word for key in keys for word in ("--set", key))]
    code = cli.main(command)
    assert code == 0, f"counterflow train ended with {code}"
    lines = (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    """Compare the schedule with 1F1B, then train with it and without it."""
    compare()
    with tempfile.TemporaryDirectory() as folder:
        schedule = f"parallel.schedule={Path(__file__).resolve()}:grouped"
        two_ranks = ["--nproc", "2", "--set", "parallel.pp=2", "--set", schedule]
        pipeline = train(Path(folder), "two-ranks", two_ranks)
        alone = train(Path(folder), "one-process", [])
    for step, (one, other) in enumerate(zip(pipeline, alone, strict=True), start=1):
        print(f"step {step}: loss {one:.6f} on two pipeline ranks, {other:.6f} in one process")
        assert math.isclose(one, other, rel_tol=1e-5), "the schedule must not change the result"


if __name__ == "__main__":
    main()
