"""A run of 20 steps with a trace of torch's profiler: the loss falls, and the trace shows where a step's time goes."""

from __future__ import annotations

import gzip
import shutil

from torch.profiler import ProfilerActivity, profile, schedule

from counterflow.configs.load import load_config
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, trainer


def run(setup: Setup, report: Report) -> None:
    steps = setup.pick(20, 3)
    config = load_config("tiny", ["precision.recipe=bf16", "batch.sequence_length=32"])
    path = setup.out / "trace.json"
    activities = [ProfilerActivity.CPU, *([] if setup.rehearse else [ProfilerActivity.CUDA])]
    with setup.alone():
        of = trainer(config, setup.device)
        losses = []
        plan = schedule(wait=steps - 2, warmup=1, active=1, repeat=1)
        with profile(activities=activities, schedule=plan) as profiled:
            for _ in range(steps):
                losses.append(of.step().loss)
                profiled.step()
        of.close()
        profiled.export_chrome_trace(str(path))
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
    report.number("losses", [losses[0], losses[-1]])
    report.number("size of trace.json.gz, bytes", path.with_suffix(".json.gz").stat().st_size)
    report.check("the loss falls", losses[-1] < losses[0], losses)
