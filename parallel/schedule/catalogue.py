"""The schedules by name: those that come with Counterflow, and any function in a user's own file.

A schedule is a function `(num_ranks, num_microbatches, *, options...) -> Schedule`; its keyword-only parameters are its
options. Every such schedule is checked, simulated, executed and drawn alike: no code depends on a schedule's name.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ...settings import UsageError
from .actions import Schedule
from .check import check_form
from .dualpipe import dualpipe
from .dualpipev import dualpipev
from .gpipe import gpipe
from .interleaved import interleaved
from .one_f_one_b import one_f_one_b
from .zb1p import zb1p

SHIPPED: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def schedule_names() -> tuple[str, ...]:
    """The names of the schedules that come with Counterflow, simplest first."""
    return tuple(SHIPPED)


def find_schedule(name: str) -> Callable[..., Schedule]:
    """The function that makes the schedule `name`: one of `schedule_names()` or `path/to/file.py:function`.

    The function returned refuses counts below 1, and a schedule whose parts do not fit each other (`check_form`).
    Options are passed on unchecked; `choose.generate` checks them first. A fault of a user's function becomes a
    UsageError that names the fault and the line.

    Raises UsageError if there is no such schedule.
    """
    if name in SHIPPED:
        return _guarded(name, SHIPPED[name])
    file, colon, function_name = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _guarded(name, _load(Path(file), function_name), Path(file))
    near = difflib.get_close_matches(name.lower(), SHIPPED, cutoff=0.4)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
        f"there is no schedule {name!r}.{meant} There are {', '.join(SHIPPED)}, "
        "and your own function as path/to/file.py:function"
    )


def options_of(schedule: Callable[..., Schedule]) -> dict[str, Any]:
    """The options of a schedule's function with their defaults: its keyword-only parameters."""
    parameters = inspect.signature(schedule).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _guarded(name: str, function: Callable[..., Schedule], file: Path | None = None) -> Callable[..., Schedule]:
    """`function` with its faults as UsageErrors; `file` is the user's file with the function, if any."""

    @functools.wraps(function)
    def build(num_ranks: int, num_microbatches: int, **options: Any) -> Schedule:
        for unit, count in (("pipeline ranks", num_ranks), ("micro-batches", num_microbatches)):
            if count < 1:
                raise UsageError(f"schedule {name} for {count} {unit}: there must be at least 1")
        called = f"schedule {name} for {num_ranks} ranks and {num_microbatches} micro-batches"
        try:
            schedule = function(num_ranks, num_microbatches, **options)
        except UsageError:
            raise
        except Exception as fault:
            raise UsageError(f"{called} failed with {type(fault).__name__}: {fault}{_where(fault, file)}") from fault
        if not isinstance(schedule, Schedule):
            raise UsageError(f"{called}: the function must return a Schedule, not a {type(schedule).__name__}")
        check_form(schedule)
        if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
            returned = f"{schedule.num_ranks} ranks and {schedule.num_microbatches} micro-batches"
            raise UsageError(f"{called}: the function returned one for {returned}")
        return schedule

    return build


def _load(path: Path, function_name: str) -> Callable[..., Schedule]:
    """Return the function of that name in a user's file."""
    if not path.is_file():
        raise UsageError(f"schedule {path}:{function_name}: there is no file {path.absolute()}")
    module = _execute(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
        has = f"its functions are {', '.join(own)}" if own else "it has none"
        raise UsageError(f"schedule {path}:{function_name}: the file has no function {function_name!r}, {has}")
    return function


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"counterflow_user_schedule_{path.stem}", path)
    assert spec is not None and spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # a dataclass looks up its own module while it is made
    try:
        spec.loader.exec_module(module)
    except Exception as fault:
        raise UsageError(f"{path} cannot be imported: {type(fault).__name__}: {fault}{_where(fault, path)}") from fault
    return module


def _where(fault: Exception, file: Path | None) -> str:
    """Innermost line of `file` in the traceback as ` (my.py, line 41)`, else empty. A SyntaxError names its line."""
    frames = traceback.extract_tb(fault.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and Path(frame.filename).resolve() == file.resolve()]
    return f" ({file.name}, line {lines[-1]})" if file is not None and lines else ""
