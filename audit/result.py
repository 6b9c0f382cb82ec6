"""What an audit found, as one JSON object: the whole of what its text and its page show.

model        parameters; tokens of a step; unigram_entropy of the held-out text; formats by class; changes
steps, against, stopped
loss         last (steps averaged), and of each run the mean loss; error, relative to `against`
validation   loss of each run on the held-out text, and error
curve        one entry a step: loss, loss_mtp and grad_norm of each run, and error
looks        every so many steps: gradients {run: {class of parameter: error, cosine}} against FP32 at the weights of
             the FP8 run; moved {run: share of the choices of experts}; classes {class of tensor: error, ...}
attribution  {together, entries {pattern: alone, without, classes}}, see `audit_attribution`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..fp8.tensor_formats import KINDS
from .case import Case

Result = Mapping[str, Any]


def make_result(
    case: Case,
    curve: Sequence[Mapping[str, Any]],
    looks: Sequence[Mapping[str, Any]],
    validation: Mapping[str, float],
    attribution: Mapping[str, Any] | None,
    stopped: str | None,
) -> dict[str, Any]:
    """The object described above."""
    config, against = case.config, case.against
    formats = {name: str(format) for name, format in config.precision.formats().items() if format is not None}
    last = max(1, len(curve) // 10)
    return {
        "model": {
            "name": config.run.name,
            "parameters": case.parameters,
            "tokens": config.batch.sequence_length * config.batch.global_sequences,
            "unigram_entropy": case.plan.data.unigram_entropy,
            "formats": formats,
            "changes": list(case.changes),
        },
        "steps": len(curve),
        "against": against,
        "stopped": stopped,
        "loss": {"last": last, **mean_loss(curve[-last:], against)} if curve else None,
        "validation": {**validation, "error": _error(validation["fp8"], validation[against])} if validation else None,
        "curve": [{**step, "error": _error(step["fp8"]["loss"], step[against]["loss"])} for step in curve],
        "looks": list(looks),
        "attribution": attribution,
    }


def mean_loss(steps: Sequence[Mapping[str, Any]], against: str) -> dict[str, float]:
    """Mean loss of both runs over `steps`, and the error of the first, relative to the other."""
    fp8, other = (fmean(step[name]["loss"] for step in steps) for name in ("fp8", against))
    return {"fp8": fp8, against: other, "error": _error(fp8, other)}


def windows(curve: Sequence[Mapping[str, Any]], against: str, count: int) -> list[dict[str, float]]:
    """The curve in about `count` means of neighbouring steps, each with the last of its steps."""
    size = max(1, -(-len(curve) // count))
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [{"step": part[-1]["step"], **mean_loss(part, against)} for part in parts]


def worst_first(result: Result) -> list[tuple[str, Mapping[str, Any]]]:
    """The classes of tensors in the order of the harm that each does alone, roles and kinds left out."""
    entries = (result["attribution"] or {"entries": {}})["entries"]
    classes = [(name, entry) for name, entry in entries.items() if "*" not in name]
    return sorted(classes, key=lambda item: most_hurt(item[1]["alone"])[1], reverse=True)


def most_hurt(errors: Mapping[str, float]) -> tuple[str, float]:
    """The kind of quantised layer whose weights' gradients have the largest error, and that error.

    Routers are left out with all that is not quantised: their gradients are small differences of large numbers, in
    which any error looks large.
    """
    parts = {name: error for name, error in errors.items() if name in KINDS}
    return max(parts.items(), key=lambda item: item[1], default=("", 0.0))


def _error(value: float, reference: float) -> float:
    return (value - reference) / reference
