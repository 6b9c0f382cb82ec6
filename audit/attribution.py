"""Harm of each class of tensors: errors of gradients with this class alone quantised, and with all but this class.

Everything else is FP32, and so is the reference. Tokens go to the same experts as in the reference: a token sent
elsewhere would change gradients at random, by more than a class does. So the error is that of quantisation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..fp8.tensor_formats import CLASSES, KINDS
from .probe import Gradients, Point, Probe, compare
from .result import Attribution, Entry, Errors
from .run import Audit

ROLES = ("input", "weight", "gradient", "cache")
OnMeasurement = Callable[[int, int], None]
"""Function called with the number of measurements made and the number of all measurements."""


def attribute(audit: Audit, point: Point, present: frozenset[str], on_measurement: OnMeasurement) -> Attribution:
    """Errors at `point`: of all classes that are `present` together, of each role and kind, and of each class."""
    groups = {name: classes for name, classes in _groups(present) if classes}
    reference = Probe(audit.case.plain("fp32"), audit.groups, audit.device).gradients(point)
    sets = dict.fromkeys([present, *groups.values(), *(present - classes for classes in groups.values())])

    def measure(quantised: frozenset[str]) -> tuple[frozenset[str], Errors]:
        probe = Probe(audit.case.only(quantised), audit.groups, audit.device)
        return quantised, _errors(probe.gradients(point, choices=reference.choices), reference)

    sets.pop(frozenset(), None)
    errors: dict[frozenset[str], Errors] = {frozenset(): {"all": 0.0}}
    for number, (quantised, found) in enumerate(audit.workers.stream(measure, list(sets)), 1):
        errors[quantised] = found
        on_measurement(number, len(sets))
    return Attribution(
        together=errors[present],
        entries={
            name: Entry(alone=errors[classes], without=errors[present - classes], classes=sorted(classes))
            for name, classes in groups.items()
        },
    )


def _groups(present: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Roles, kinds and classes, by the pattern that names them in `precision.classes`."""
    for role in ROLES:
        yield f"*.{role}", frozenset(name for name in present if name.endswith(f".{role}"))
    for kind in KINDS:
        yield f"{kind}.*", frozenset(name for name in present if name.startswith(f"{kind}."))
    for name in CLASSES:
        yield name, frozenset({name} & present)


def _errors(gradients: Gradients, reference: Gradients) -> Errors:
    return {name: sums.error for name, sums in compare(gradients, reference).items()}
