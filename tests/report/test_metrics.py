"""Records of steps: metrics.jsonl holds each step once across kills and resumes, and TensorBoard shows the same."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from counterflow.report.balance import LayerBalance
from counterflow.report.metrics import (
    GROUPS,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    MetricsWriter,
    StepMetrics,
    read_metrics,
    utilization,
)


def metrics_of(step: int, **changed: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "tokens": step * 2048,
        "sequences": 4,
        "loss": 3.0 - 0.1 * step,
        "loss_mtp": 3.5,
        "loss_balance": 1.01,
        "grad_norm": 0.5,
        "lr": 2.2e-4,
        "bias_update_speed": 0.001,
        "mtp_weight": 0.3,
        "tokens_per_second": 12345.0,
        "mfu": 0.41,
        "max_vio": 0.2,
        "max_vio_worst": 0.9,
        "layers": LayerBalance(max_vio=(0.1, 0.3), load_cv=(0.05, 0.2), rank_vio=(0.0, 0.1), dropped=(0.0, 0.0)),
        "memory_gib": 1.5,
        "step_seconds": 0.25,
    }
    return StepMetrics(**{**values, **changed})


def write_steps(folder: Path, steps: range, resume_step: int = 0, tensorboard: bool = False, loss: float = 1.0) -> None:
    with MetricsWriter(folder, tensorboard=tensorboard, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(metrics_of(step, loss=loss))


def test_each_step_is_one_json_object_with_the_documented_names(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3]
    names = ("tokens", "loss", "loss_mtp", "loss_balance", "grad_norm", "lr", "tokens_per_second", "max_vio", "mfu")
    assert all(name in records[0] for name in names)
    assert records[0]["validation_loss"] is None


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = [metrics_of(1), metrics_of(2, loss=0.1 + 0.2, validation_loss=2.5, mfu=None)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for metrics in written:
            writer.write(metrics)
    assert list(read_metrics(tmp_path)) == written


def test_numbers_that_are_not_finite_stay_strict_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(metrics_of(1, loss=math.nan, grad_norm=math.inf, loss_mtp=-math.inf))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert (record["loss"], record["grad_norm"], record["loss_mtp"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read.loss)
    assert (read.grad_norm, read.loss_mtp) == (math.inf, -math.inf)


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), loss=1.0)
    write_steps(tmp_path, range(6, 10), resume_step=5, loss=2.0)
    assert [(m.step, m.loss) for m in read_metrics(tmp_path)] == [(s, 1.0 if s <= 5 else 2.0) for s in range(1, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE]


def test_a_fresh_start_drops_a_run_that_ended_before_its_first_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert [m.step for m in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_dropped_or_completed_on_resume(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    complete = 5 if cut == 1 else 4  # the newline alone may be missing
    assert [m.step for m in read_metrics(tmp_path)] == list(range(1, complete + 1))
    write_steps(tmp_path, range(6, 8), resume_step=5)
    assert [m.step for m in read_metrics(tmp_path)] == [*range(1, complete + 1), 6, 7]


def test_dropped_lines_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(tmp_path, range(1, 4))
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(b'{"step": 4, "los\xff\x00')
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(4, 5), resume_step=3)
    assert "dropped 1 unreadable line" in caplog.text
    assert [m.step for m in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_broken_line_inside_the_file_is_named_when_read(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / METRICS_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 does not record a step"):
        list(read_metrics(tmp_path))


def test_a_killed_process_loses_no_finished_step(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_metrics import MetricsWriter, metrics_of
writer = MetricsWriter({str(tmp_path)!r}, tensorboard=True)
for step in range(1, 8):
    writer.write(metrics_of(step))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert [m.step for m in read_metrics(tmp_path)] == list(range(1, 8))
    assert [event.step for event in tensorboard_scalars(tmp_path)["loss/loss"]] == list(range(1, 8))


def tensorboard_scalars(folder: Path) -> dict[str, list[Any]]:
    """Scalars as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER), purge_orphaned_data=True)
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_measured_number_once_across_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), tensorboard=True, loss=1.0)
    write_steps(tmp_path, range(6, 10), resume_step=5, tensorboard=True, loss=2.0)
    scalars = tensorboard_scalars(tmp_path)
    assert [(e.step, e.value) for e in scalars["loss/loss"]] == [(s, 1.0 if s <= 5 else 2.0) for s in range(1, 10)]
    measured = {name for name, value in metrics_of(1) if value is not None and name not in ("step", "layers")}
    of_layers = {f"{name}/{layer}" for name in ("max_vio", "load_cv", "rank_vio", "dropped") for layer in (0, 1)}
    assert {tag.split("/")[1] for tag in scalars.keys() - of_layers} == measured
    assert [scalars[f"load_cv/{layer}"][0].value for layer in (0, 1)] == pytest.approx([0.05, 0.2])


def test_every_field_belongs_to_a_section_of_tensorboard() -> None:
    placed = [field for fields in GROUPS.values() for field in fields]
    assert sorted([*placed, "step", "traffic", "layers"]) == sorted(StepMetrics.model_fields)


def test_without_tensorboard_a_warning_says_what_to_install_and_metrics_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # makes the import fail as a missing package does
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(1, 3), tensorboard=True)
    assert "pip install tensorboard" in caplog.text
    assert [m.step for m in read_metrics(tmp_path)] == [1, 2]
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()


def test_a_misspelled_measurement_is_an_error() -> None:
    with pytest.raises(ValueError, match="los_mtp"):
        metrics_of(1, los_mtp=2.0)


def test_deepseek_v3_trained_at_a_plausible_utilization() -> None:
    # V3 §1: 180K H800 hours per trillion tokens; 291.8 GFLOP per token by our convention at 4096 tokens, one MTP module
    tokens_per_second_and_gpu = 1e12 / (180e3 * 3600)
    assert utilization(2048 * tokens_per_second_and_gpu, 291.8e9, ranks=2048, peak_tflops=989.0) == pytest.approx(
        0.455, abs=0.001
    )
