"""Records and result of an audit: all numbers of its text and its page, as models that are one JSON object together.

The run that FP8 is compared with is called `bf16` or `fp32` in JSON; here its value is called `other` in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from ..fp8.tensor_formats import KINDS
from .case import AuditCase

Value = TypeVar("Value")
Reference = Literal["bf16", "fp32"]
Errors = dict[str, float]
"""Relative errors of gradients, by class of parameter, and of `all` together."""


class Record(BaseModel):
    """Base of all parts of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Both(Record, Generic[Value]):
    """A value of each run: of the FP8 run, and of the run that it is compared with.

    Exactly one of `bf16` and `fp32` is set; the other has no key in JSON.
    """

    fp8: Value
    bf16: Value | None = None
    fp32: Value | None = None

    @property
    def other(self) -> Value:
        """The value of the run that FP8 is compared with."""
        value = self.fp32 if self.bf16 is None else self.bf16
        assert value is not None
        return value

    @model_serializer(mode="wrap")
    def _without_the_third(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        names = sorted(fields, key=lambda name: name not in ("step", "last"))  # the step of the values comes first
        return {name: fields[name] for name in names if fields[name] is not None or name not in ("bf16", "fp32")}


class RunStep(Record):
    """Numbers of one run's step, as `StepMetrics` has them."""

    loss: float
    loss_mtp: float | None = None
    grad_norm: float


class AuditStep(Both[RunStep]):
    """The same step of both runs."""

    step: int


class CurveStep(AuditStep):
    """A step with the relative error of the FP8 run's loss."""

    error: float


class MeanLoss(Both[float]):
    """Losses of both runs, and the relative error of the FP8 run's."""

    error: float


class LastLoss(MeanLoss):
    """Mean losses over the last steps."""

    last: int
    """Number of these steps."""


class WindowLoss(MeanLoss):
    """Mean losses over neighbouring steps."""

    step: int
    """The last of these steps."""


class Deviation(Record):
    """Distance of gradients from a reference."""

    error: float
    """||g - reference|| / ||reference||."""
    cosine: float


class Deviations(Record):
    """Deviations from FP32 of two precisions' gradients, by class of parameter, and of `all` together."""

    fp8: dict[str, Deviation]
    bf16: dict[str, Deviation]


class MovedShares(Record):
    """Shares of the choices of experts that differ from FP32's."""

    fp8: float
    bf16: float


class TensorClass(Record):
    """Statistics of the quantisation of one class of tensors, see `fp8/statistics.py: Sums`."""

    error: float
    row_error: float
    underflow: float
    saturation: float
    binades: float
    values: int
    nonzero: int
    zeroed: int
    saturated: int
    squares: float
    squared_error: float
    rows: int
    row_errors: float
    worst_row: float
    largest: float
    smallest: float


class Look(Record):
    """Gradients of the step after `step`, at the weights of the FP8 run, and the quantisation of its tensors."""

    step: int
    gradients: Deviations
    moved: MovedShares
    classes: dict[str, TensorClass]
    classes_for_weights: dict[str, TensorClass]
    """Operands of the product for weight gradients, which tile the other dimension."""


class Entry(Record):
    """Errors of gradients by one set of classes of tensors."""

    alone: Errors
    """Errors with these quantised and nothing else."""
    without: Errors
    """Errors with all quantised but these."""
    classes: list[str]


class Attribution(Record):
    """Errors of gradients by the classes that are quantised."""

    together: Errors
    """Errors with all classes quantised."""
    entries: dict[str, Entry]
    """By the pattern that names the classes in `precision.classes`: roles, kinds, and each class."""

    def worst_first(self) -> list[tuple[str, Entry]]:
        """The single classes of tensors in the order of the harm that each does alone."""
        classes = [(name, entry) for name, entry in self.entries.items() if "*" not in name]
        return sorted(classes, key=lambda item: most_hurt(item[1].alone)[1], reverse=True)


class AuditedModel(Record):
    """The model and the text of an audit."""

    name: str
    parameters: int
    tokens: int
    """Tokens of a step."""
    unigram_entropy: float
    """Entropy of the held-out text, in nats."""
    formats: dict[str, str]
    """Format of each class of tensors that is quantised."""
    changes: list[str]


class Result(Record):
    """Everything that an audit found."""

    model: AuditedModel
    steps: int
    against: Reference
    stopped: str | None
    """Reason why a run did not reach the last step."""
    loss: LastLoss | None
    validation: MeanLoss | None
    """Losses over the held-out sequences."""
    curve: list[CurveStep]
    looks: list[Look]
    attribution: Attribution | None


def make_result(
    case: AuditCase,
    curve: Sequence[AuditStep],
    looks: Sequence[Look],
    validation: MeanLoss | None,
    attribution: Attribution | None,
    stopped: str | None,
) -> Result:
    """Result of an audit's records."""
    config = case.config
    last = max(1, len(curve) // 10)
    return Result(
        model=AuditedModel(
            name=config.run.name,
            parameters=case.parameters,
            tokens=config.batch.sequence_length * config.batch.global_sequences,
            unigram_entropy=case.plan.data.unigram_entropy,
            formats={name: str(format) for name, format in config.precision.formats().items() if format is not None},
            changes=list(case.changes),
        ),
        steps=len(curve),
        against=case.against,
        stopped=stopped,
        loss=LastLoss(last=last, **dict(mean_loss(curve[-last:]))) if curve else None,
        validation=validation,
        curve=[CurveStep(error=relative_error(step.fp8.loss, step.other.loss), **dict(step)) for step in curve],
        looks=list(looks),
        attribution=attribution,
    )


def both_losses(fp8: float, other: float, against: Reference) -> MeanLoss:
    """Losses of both runs with their relative error."""
    error = relative_error(fp8, other)
    return (
        MeanLoss(fp8=fp8, bf16=other, error=error) if against == "bf16" else MeanLoss(fp8=fp8, fp32=other, error=error)
    )


def mean_loss(steps: Sequence[AuditStep]) -> MeanLoss:
    """Mean losses of both runs over `steps`."""
    against: Reference = "fp32" if steps[0].bf16 is None else "bf16"
    return both_losses(fmean(step.fp8.loss for step in steps), fmean(step.other.loss for step in steps), against)


def windows(curve: Sequence[AuditStep], count: int) -> list[WindowLoss]:
    """The curve in about `count` means of neighbouring steps."""
    size = max(1, -(-len(curve) // count))
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [WindowLoss(step=part[-1].step, **dict(mean_loss(part))) for part in parts]


def most_hurt(errors: Mapping[str, float]) -> tuple[str, float]:
    """The kind of quantised layer whose weights' gradients have the largest error, and that error.

    Routers are left out, like everything that is not quantised: their gradients are small differences of large numbers,
    so any error looks large.
    """
    parts = {name: error for name, error in errors.items() if name in KINDS}
    return max(parts.items(), key=lambda item: item[1], default=("", 0.0))


def relative_error(value: float, reference: float) -> float:
    return (value - reference) / reference
