"""Which class of tensors hurts: gradients with each quantised alone, and with all but it.

All else is FP32 here, and so is the reference, and tokens go to the experts that they go to in the reference: the error
is that of quantisation and nothing else's. A token that moved would change gradients by more than a class does, at
random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..fp8.tensor_formats import CLASSES, KINDS
from .probe import Gradients, Point, Probe, compare
from .run import Audit

ROLES = ("input", "weight", "gradient", "cache")


def attribute(audit: Audit, point: Point, present: frozenset[str], told: Callable[[int, int], None]) -> dict[str, Any]:
    """Errors at `point`, of all classes that are `present` together, of each role and kind, and of each class.

    An entry has `alone`, the error with nothing else quantised, and `without`, that of all but these, each as
    {class of parameter: error}, with `all` of them.
    """
    groups = {name: chosen for name, chosen in _groups(present) if chosen}

    reference = Probe(audit.case.plain("fp32"), audit.groups, audit.device).gradients(point)
    sets = dict.fromkeys([present, *groups.values(), *(present - chosen for chosen in groups.values())])

    def measure(kept: frozenset[str]) -> tuple[frozenset[str], dict[str, float]]:
        probe = Probe(audit.case.only(kept), audit.groups, audit.device)
        return kept, _errors(probe.gradients(point, choices=reference.choices), reference)

    sets.pop(frozenset(), None)
    found = {frozenset[str](): {"all": 0.0}}
    for number, (kept, errors) in enumerate(audit.workers.stream(measure, list(sets)), 1):
        found[kept] = errors
        told(number, len(sets))
    return {
        "together": found[present],
        "entries": {
            name: {"alone": found[chosen], "without": found[present - chosen], "classes": sorted(chosen)}
            for name, chosen in groups.items()
        },
    }


def _groups(present: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Roles, kinds and classes, by the pattern that names them in `precision.classes`."""
    for role in ROLES:
        yield f"*.{role}", frozenset(name for name in present if name.endswith(f".{role}"))
    for kind in KINDS:
        yield f"{kind}.*", frozenset(name for name in present if name.startswith(f"{kind}."))
    for name in CLASSES:
        yield name, frozenset({name} & present)


def _errors(gradients: Gradients, reference: Gradients) -> dict[str, float]:
    return {name: difference.error for name, difference in compare(gradients, reference).items()}
