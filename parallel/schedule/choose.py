"""The schedule of a run: the configured one with its options, or the default for its number of ranks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...settings import UsageError
from ..config import yaml_text
from .actions import Schedule
from .catalogue import find_schedule, options_of

AUTO = "auto"


def default_schedule(num_ranks: int) -> str:
    """The schedule that `auto` selects: V3's DualPipe where the number of ranks is even, DualPipeV where it is odd.

    On one rank 1F1B runs each micro-batch's forward and backward in turn and holds one micro-batch. No other code
    prefers a schedule by name.
    """
    if num_ranks == 1:
        return "1f1b"
    return "dualpipev" if num_ranks % 2 else "dualpipe"


def schedule_name(name: str, num_ranks: int) -> str:
    """Return `name`, or the schedule that `auto` selects on `num_ranks` ranks."""
    return default_schedule(num_ranks) if name == AUTO else name


def generate(name: str, num_ranks: int, num_microbatches: int, options: Mapping[str, Any]) -> Schedule:
    """Return the schedule called `name` (or AUTO, or "file.py:function"), not checked yet.

    Raises UsageError for an unknown name, an unknown or ill-typed option, and numbers the schedule cannot serve.
    """
    function = find_schedule(schedule_name(name, num_ranks))
    faults = option_faults(function, options)
    if faults:
        shown = schedule_name(name, num_ranks)
        raise UsageError("; ".join(f"schedule {shown}: option {option} {fault}" for option, fault in faults.items()))
    return function(num_ranks, num_microbatches, **options)


def example(name: str, num_ranks: int, options: Mapping[str, Any]) -> Schedule:
    """Return the schedule for some number of micro-batches; its stages and their ranks do not depend on this number.

    A schedule may require a multiple, so several numbers are tried. If all are refused, the first error is raised.
    """
    refusals = []
    for count in (2 * num_ranks, 6 * num_ranks, 60 * num_ranks):
        try:
            return generate(name, num_ranks, count, options)
        except UsageError as error:
            refusals.append(error)
    raise refusals[0]


def option_faults(function: Callable[..., Schedule], options: Mapping[str, Any]) -> dict[str, str]:
    """Faults of a schedule's given and missing options, by name. A value must have the type of the option's default."""
    parameters = options_of(function)
    faults = {}
    for name, value in options.items():
        if name not in parameters:
            faults[name] = _unknown(name, list(parameters))
        elif not _fits(value, parameters[name]):
            faults[name] = f"expects {_EXPECTED[type(parameters[name])]}, got {yaml_text(value)}"
    for name, default in parameters.items():
        if default is inspect.Parameter.empty and name not in options:
            faults[name] = "has to be given"
    return faults


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _fits(value: object, default: object) -> bool:
    if type(default) not in _EXPECTED:  # no default, or one of another type, which the function checks itself
        return True
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"is unknown (did you mean {near[0]}?)"
    return f"is unknown: {'it takes ' + ', '.join(known) if known else 'it takes none'}"
