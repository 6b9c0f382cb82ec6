"""Measurements of a step, and the files that record them: `metrics.jsonl` and TensorBoard.

`metrics.jsonl` has one JSON object per step, in order, each step once, across any number of resumes. A field that was
not measured is null. JSON cannot write a number that is not finite, and null would hide exactly the steps that went
wrong. So such numbers are the strings "NaN", "Infinity" and "-Infinity" (Python's `float()` reads all three).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .balance import LayerBalance
from .text.numbers import count
from .traffic import Sent, bytes_over

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

log = logging.getLogger(__name__)


class StepMetrics(BaseModel):
    """Measurements of one optimizer step. Losses are means over the global batch, in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int  # counted from 1
    tokens: int  # of training so far, this step included
    sequences: int  # of this step's global batch
    loss: float  # next-token cross-entropy alone
    loss_mtp: float | None = None  # mean over MTP depths, before its weight; None without MTP
    loss_balance: float | None = None  # sum over layers, before its weight; None without MoE layers
    loss_device: float | None = None  # the same over groups of experts; None where there is one group
    loss_communication: float | None = None  # the same of the tokens that are sent to groups
    grad_norm: float  # global, before clipping
    lr: float
    bias_update_speed: float
    mtp_weight: float
    tokens_per_second: float  # of all ranks together
    mfu: float | None = None  # share of the peak, 1.0 = all of it
    max_vio: float | None = None  # mean over MoE layers of (largest - mean) / mean expert load
    max_vio_worst: float | None = None  # the same of the worst layer
    load_cv: float | None = None  # mean over MoE layers of standard deviation / mean expert load
    load_cv_worst: float | None = None
    rank_vio: float | None = None  # as max_vio, of the ranks of an expert parallel group; None for a group of one
    rank_vio_worst: float | None = None
    node_vio: float | None = None  # the same of the nodes of these ranks
    node_vio_worst: float | None = None
    dropped: float | None = None  # share of (token, expert) pairs
    dropped_worst: float | None = None
    layers: LayerBalance | None = None  # the same measures, one value per MoE layer
    memory_gib: float  # peak of the rank that writes the metrics
    step_seconds: float
    traffic: tuple[Sent, ...] | None = None  # of all ranks in this step; None where nothing was counted
    validation_loss: float | None = None  # on steps that evaluate
    validation_loss_ema: float | None = None  # the same of the averaged weights; None without them


def utilization(tokens_per_second: float, flops_per_token: float, ranks: int, peak_tflops: float) -> float:
    """MFU: the model's own FLOP/s as a share of the peak of `ranks` devices, 1.0 = all of it.

    `tokens_per_second` is the speed of all ranks together, `peak_tflops` the peak of one rank's device.
    """
    return tokens_per_second * flops_per_token / (ranks * peak_tflops * 1e12)


def read_metrics(run_dir: str | Path) -> Iterator[StepMetrics]:
    """Steps recorded in a run folder, in order. A last line that a kill cut short is left out.

    Raises FileNotFoundError if the run has no metrics yet, ValueError naming file and line at any other bad line.
    """
    path = Path(run_dir) / METRICS_FILE
    with open(path, "rb") as lines:
        for position, line in enumerate(lines, start=1):
            try:
                yield StepMetrics.model_validate_json(line)
            except ValidationError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {position} does not record a step: {error}") from error


class MetricsWriter:
    """Writer of each step's metrics into a run folder; one rank has it.

    `resume_step` is the last step before the resume, 0 for a fresh run. A killed run may have written lines after its
    last checkpoint: lines of steps after `resume_step` are dropped (the file is replaced in one move), and
    TensorBoard drops them too. Each line is handed to the operating system at once, so a killed process loses none.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool, resume_step: int = 0) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep_until(self.path, resume_step)
        self._last_step = resume_step
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = _open_tensorboard(self.path.parent / TENSORBOARD_FOLDER, resume_step) if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        assert metrics.step > self._last_step, f"step {metrics.step} written after step {self._last_step}"
        self._last_step = metrics.step
        self._file.write(metrics.model_dump_json() + "\n")
        self._file.flush()
        if self._events is not None:
            _write_scalars(self._events, metrics)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keep_until(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and lines that record no step, from a metrics file."""
    unreadable = 0
    partial = path.with_suffix(".partial")
    with open(path, "rb") as lines, open(partial, "wb") as kept:
        for line in lines:
            step = _step_of(line)
            if step is not None and step <= last_step:
                kept.write(line.rstrip(b"\n") + b"\n")  # the last line may lack only its newline
            unreadable += step is None
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(partial, path)
    if unreadable:
        log.warning("%s: dropped %s that a killed run left behind", path, count(unreadable, "unreadable line"))


def _step_of(line: bytes) -> int | None:
    """Step that a line records; None for a line that is no whole record."""
    try:
        record = json.loads(line)
    except ValueError:  # bytes that are not UTF-8 raise it too
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _open_tensorboard(folder: Path, resume_step: int) -> Any | None:
    """Open a SummaryWriter. Without tensorboard installed: None, and a warning."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning(
            "tensorboard is not installed, so no events are written (metrics.jsonl has the same numbers): "
            "`pip install tensorboard`, or set log.tensorboard to false"
        )
        return None
    make: Callable[..., Any] = SummaryWriter
    return make(str(folder), purge_step=resume_step + 1)


GROUPS = {
    "loss": (
        *("loss", "loss_mtp", "loss_balance", "loss_device", "loss_communication"),
        *("validation_loss", "validation_loss_ema"),
    ),
    "optimizer": ("grad_norm", "lr", "bias_update_speed", "mtp_weight", "sequences", "tokens"),
    "speed": ("tokens_per_second", "mfu", "step_seconds", "memory_gib"),
    "balance": (
        *("max_vio", "max_vio_worst", "load_cv", "load_cv_worst", "rank_vio", "rank_vio_worst"),
        *("node_vio", "node_vio_worst", "dropped", "dropped_worst"),
    ),
}
"""TensorBoard's sections: field `lr` appears as `optimizer/lr`, layer 3's value in `layers` as `max_vio/3`."""


def _write_scalars(events: Any, metrics: StepMetrics) -> None:
    for group, fields in GROUPS.items():
        for field in fields:
            value = getattr(metrics, field)
            if value is not None:
                events.add_scalar(f"{group}/{field}", value, metrics.step)
    for field, values in metrics.layers or ():
        for layer, value in enumerate(values or ()):
            events.add_scalar(f"{field}/{layer}", value, metrics.step)
    if metrics.traffic is not None:
        for link in ("within", "between"):
            events.add_scalar(f"traffic/{link}_nodes_bytes", bytes_over(metrics.traffic, link), metrics.step)
    events.flush()  # so that after a kill the events reach as far as metrics.jsonl
