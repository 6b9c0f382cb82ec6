"""The `log` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..settings import Section, key


class LogConfig(Section):
    """What is written while a run goes on. metrics.jsonl gets every step, whatever is set here."""

    progress: bool = key(True, "show a progress bar on a terminal, plain lines elsewhere")
    every: int = key(10, "steps between plain progress lines where there is no terminal", unit="steps", ge=1)
    trace_step: int | None = key(
        3,
        "step whose pipeline is timed and drawn, measured above simulated, in traces/step-N.html; null draws none",
        ge=1,
    )
    tensorboard: bool = key(True, "write TensorBoard events")
    peak_tflops: Annotated[float, Field(gt=0)] | Literal["auto"] = key(
        "auto",
        "dense peak of one rank's device, for MFU; auto looks known GPUs up and times a matmul elsewhere",
        unit="TFLOP/s",
    )
