"""The `log` section."""

from __future__ import annotations

from typing import Literal

from ..settings import Section, key


class LogConfig(Section):
    """What is written while a run goes on. metrics.jsonl gets every step, whatever is set here."""

    progress: bool = key(True, "show a progress bar on a terminal, plain lines elsewhere")
    every: int = key(10, "steps between plain progress lines where there is no terminal", unit="steps", ge=1)
    tensorboard: bool = key(True, "write TensorBoard events")
    peak_tflops: float | Literal["auto"] = key(
        "auto",
        "dense peak of one rank's device that MFU is measured against; auto looks GPUs up and times a matmul on CPUs",
        unit="TFLOP/s",
    )
