"""Progress on a terminal (two lines of 80 columns), in a log (plain lines) and on standard output (nothing)."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from counterflow.configs.sections import LogConfig
from counterflow.model.config import ModelConfig
from counterflow.model.counts import FLOP_CONVENTION, count_parameters
from counterflow.report.hardware import Peak
from counterflow.report.metrics import StepMetrics
from counterflow.report.progress import ProgressDisplay
from counterflow.report.summary import RunSummary, describe_run
from counterflow.report.text.numbers import format_duration


def metrics_of(step: int, **changed: Any) -> StepMetrics:
    """Measurements with the widest numbers of a real run."""
    values: dict[str, Any] = {
        "step": step,
        "tokens": step * 63_000_000,
        "sequences": 15360,
        "loss": 11.8599,
        "grad_norm": 0.5,
        "lr": 2.2e-4,
        "bias_update_speed": 0.001,
        "mtp_weight": 0.3,
        "tokens_per_second": 987_654.0,
        "mfu": 0.4123,
        "max_vio": 12.34,
        "memory_gib": 139.2,
        "step_seconds": 0.25,
    }
    return StepMetrics(**{**values, **changed})


class Clock:
    """Clock that moves only when a test sets `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def show(config: LogConfig, steps: range, total: int, clock: Clock, terminal: int = 0, **changed: Any) -> str:
    """Output of a run of two-second steps on a terminal of `terminal` columns, or in a log where that is 0."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal > 0, width=terminal or None, legacy_windows=False)
    with ProgressDisplay(config, "deepseek-v3-671b", total, steps.start - 1, console, clock) as progress:
        for step in steps:
            clock.now += 2.0
            progress.update(metrics_of(step, **changed))
    return output.getvalue()


def visible(output: str) -> list[str]:
    """Lines that were drawn on a terminal, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output))


def test_bar_shows_everything_within_80_columns(clock: Clock) -> None:
    lines = visible(show(LogConfig(), range(1, 4), 250_000, clock, terminal=80, validation_loss=11.2345))
    assert max(map(len, lines)) <= 80
    *_, bar, values = [line for line in lines if line.strip()]
    assert bar.startswith("deepseek-v3-671b 3/250000 ")
    assert bar.endswith("0.0% ETA 5d 18h")  # 249,997 steps of two seconds
    assert values.split("  ") == [
        "loss 11.8599",
        "val 11.2345",
        "987.7K tok/s",
        "MFU 41.2%",
        "mem 139.2 GiB",
        "MaxVio 12.34",
    ]


def test_bar_keeps_the_last_validation_loss(clock: Clock) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with ProgressDisplay(LogConfig(), "smoke", 9, console=console, clock=clock) as progress:
        for step in range(1, 10):
            clock.now += 2.0
            progress.update(metrics_of(step, validation_loss=7.5 if step == 4 else None))
    drawn = visible(output.getvalue())
    assert "val 7.5000" in [line for line in drawn if line.startswith("loss")][-1]
    assert "val" not in next(line for line in drawn if line.startswith("loss"))


def test_plain_lines_come_at_the_first_every_nth_evaluated_and_last_step(clock: Clock) -> None:
    output = show(LogConfig(every=10), range(1, 36), 35, clock)
    assert "\x1b" not in output
    assert [int(line.split()[1].split("/")[0]) for line in output.splitlines()] == [1, 10, 20, 30, 35]
    evaluated = show(LogConfig(every=1000), range(41, 44), 99, clock, validation_loss=2.0)
    assert [line.split()[1] for line in evaluated.splitlines()] == ["41/99", "42/99", "43/99"]
    assert "val 2.0000" in evaluated


def test_plain_lines_are_not_folded_at_80_columns(clock: Clock) -> None:
    output = show(LogConfig(every=1), range(249_990, 250_001), 250_000, clock, validation_loss=11.0)
    assert len(output.splitlines()) == 11
    assert all("ETA" in line for line in output.splitlines())


def test_progress_false_shows_no_steps(clock: Clock) -> None:
    assert show(LogConfig(progress=False), range(1, 30), 29, clock) == ""
    assert show(LogConfig(progress=False), range(1, 30), 29, clock, terminal=80) == ""


def test_missing_measurements_are_left_out(clock: Clock) -> None:
    output = show(LogConfig(), range(1, 2), 1, clock, mfu=None, max_vio=None)
    assert "MFU" not in output
    assert "MaxVio" not in output
    assert "None" not in output


def test_eta_counts_pauses_and_follows_a_change_of_pace(clock: Clock) -> None:
    output = io.StringIO()
    with ProgressDisplay(LogConfig(every=1), "smoke", 400, console=Console(file=output), clock=clock) as progress:
        for step in range(1, 301):
            clock.now += 1.0 if step <= 100 else 4.0  # the batch grew
            clock.now += 5.0 if step % 10 == 0 else 0.0  # an evaluation every ten steps, outside step_seconds
            progress.update(metrics_of(step))
    etas = [line.split("ETA ")[1] for line in output.getvalue().splitlines()]
    assert etas[99] == format_duration(300 * 1.5)
    assert etas[299] == format_duration(100 * 4.5)


def test_eta_after_a_resume_does_not_count_the_steps_before_it(clock: Clock) -> None:
    output = show(LogConfig(every=1), range(901, 911), 1000, clock)
    assert output.splitlines()[-1].endswith("ETA 3:00")  # 90 steps of two seconds


def test_notes_and_rows_stand_above_the_bar(clock: Clock) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with ProgressDisplay(LogConfig(), "smoke", 2, console=console, clock=clock) as progress:
        progress.show_rows("counterflow", {"model": "1 [bold]parameter[/]", "run": "runs/x"})
        progress.update(metrics_of(1))
        progress.note("checkpoint [1] written")
        clock.now += 2.0
        progress.update(metrics_of(2))
    lines = visible(output.getvalue())
    note = lines.index("checkpoint [1] written")
    assert lines.index("  model  1 [bold]parameter[/]") < lines.index("  run    runs/x") < note
    assert any(line.startswith("smoke 2/2") for line in lines[note:])


def test_standard_output_stays_clean_for_json() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_progress import Console, LogConfig, ProgressDisplay, RunSummary, metrics_of
for terminal in (False, True):
    Console.is_terminal = property(lambda self: terminal)
    with ProgressDisplay(LogConfig(every=1), "smoke", 2) as progress:
        progress.show_rows("counterflow", {{"run": "runs/x"}})
        for step in (1, 2):
            progress.update(metrics_of(step))
            print("from training", terminal, step)
print(RunSummary(steps=2, loss=1, validation_loss=None, unigram_entropy=None, tokens_per_second=1, run_dir="x")
      .model_dump_json())
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    *printed, last = ran.stdout.splitlines()
    assert printed == [f"from training {terminal} {step}" for terminal in (False, True) for step in (1, 2)]
    assert json.loads(last)["steps"] == 2
    assert ran.stderr.count("runs/x") == 2
    assert ran.stderr.count("11.8599") >= 4


def test_header_names_sizes_layout_convention_and_peak_within_80_columns(clock: Clock) -> None:
    counts = count_parameters(ModelConfig())
    rows = describe_run(
        total_parameters=counts.total,
        active_parameters=counts.active,
        mtp_parameters=counts.trained - counts.total,
        layout="2048 ranks on 256 nodes: pp 16 x edp 2 x ep 64 (dp 128)",
        dispatch="two-hop, 64 ranks on 8 nodes; tokens travel in FP8",
        flop_convention=FLOP_CONVENTION,
        peak=Peak(0.2134, "measured with a 2048-cubed bfloat16 matmul"),
        run_dir="runs/deepseek-v3-671b",
    )
    assert rows["model"] == "671.0B parameters, 37.6B active per token; MTP adds 11.6B"
    assert rows["peak"] == "0.213 TFLOP/s per rank, measured with a 2048-cubed bfloat16 matmul"
    output = io.StringIO()
    ProgressDisplay(LogConfig(), "smoke", 1, console=Console(file=output)).show_rows("counterflow", rows)
    assert all(len(line) <= 80 for line in output.getvalue().splitlines())
    assert "no causal discount" in output.getvalue()


def test_summary_shows_validation_loss_beside_the_unigram_entropy() -> None:
    summary = RunSummary(
        steps=200, loss=2.1, validation_loss=2.25, unigram_entropy=3.31, tokens_per_second=12_345.0, run_dir="runs/x"
    )
    names = list(summary.rows())
    assert names[names.index("validation loss") + 1] == "unigram entropy"
    assert summary.rows()["validation loss"] == "2.2500"
    assert summary.rows()["unigram entropy"].startswith("3.3100")
    assert {"steps", "loss", "validation_loss", "tokens_per_second", "run_dir"} <= json.loads(
        summary.model_dump_json()
    ).keys()
