"""Places where the host waits for the GPU in a step: one a MoE layer and micro-batch, for the counts of the rows."""

from __future__ import annotations

import re
import traceback
import warnings
from collections import Counter
from typing import Any

import torch

from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, batches, forward_backward, trainer

LAYERS, MICROBATCHES = 2, 4


def run(setup: Setup, report: Report) -> None:
    recipes = {"BF16": ("precision.recipe=bf16",), "FP8": ("precision.recipe=fp8", "precision.backend=emulated")}
    for name, more in recipes.items():
        with setup.alone(), report.attempt(name):
            _count(setup, report, name, more)


def _count(setup: Setup, report: Report, name: str, more: tuple[str, ...]) -> None:
    length = setup.pick(4096, 16)
    config = setup.wide(
        LAYERS, f"batch.sequence_length={length}", f"batch.global_sequences={MICROBATCHES}", "optim.moments=bf16", *more
    )
    of, given = trainer(config, setup.device), batches(config, MICROBATCHES)
    forward_backward(of, given)
    places: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [
                f for f in traceback.extract_stack() if "counterflow" in f.filename and "/prove/" not in f.filename
            ]
            at = frames[-1] if frames else None
            places["elsewhere" if at is None else f"{re.sub('.*counterflow/', '', at.filename)}:{at.lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        plain, warnings.showwarning = warnings.showwarning, note
        try:
            if not setup.rehearse:
                torch.cuda.set_sync_debug_mode("warn")
            forward_backward(of, given)
        finally:
            if not setup.rehearse:
                torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = plain
    for place, count in places.most_common():
        report.row(f"waits, {name}", place=place, a_layer=count / LAYERS / MICROBATCHES)
    total = sum(places.values()) / LAYERS / MICROBATCHES
    report.number(f"{name}: waits a MoE layer and micro-batch", total)
    if name == "BF16":
        report.check(f"{name}: at most one wait a MoE layer, and few a step", total <= 1.5, total)
