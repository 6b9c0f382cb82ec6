"""Checks a configuration and says in words what is wrong, every fault at the line that caused it."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

from ..settings import SectionFaults, TokenSchedule
from .config import Config
from .located_yaml import Fault, Located, Path
from .schema import alternatives, choices, in_words, item_of, resolve, section_of, unknown_key

_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def validate(tree: Located) -> tuple[Config | None, list[Fault]]:
    """The configuration that `tree` describes, or every fault in it.

    A section with a bad key never gets as far as its checks of one key against another, nor do the checks across
    sections. So the bad keys are taken out and the rest is checked again, until nothing new turns up. Faults between
    keys count only where every key involved is as the user wrote it.
    """
    faults: list[Fault] = []
    hidden: set[Path] = set()
    while True:
        values = _plain(tree, Config, hidden)
        if ("train",) in hidden:
            values["train"] = {"steps": 1}  # the one section that has to be given: without it the rest is not checked
        try:
            config = Config.model_validate(values, strict=True)
        except ValidationError as error:
            before = len(hidden)
            faults += _Report(tree, hidden).read(error)
            if len(hidden) > before:
                continue
        else:
            if not hidden:
                return config, []
        return None, faults


def _plain(located: Located, annotation: Any, hidden: set[Path], path: Path = ()) -> Any:
    """Python values for pydantic's strict mode, without the keys at `hidden`."""
    value = located.value
    if isinstance(value, dict):
        section = section_of(annotation)
        fields = section.model_fields if section else {}
        return {
            name: _plain(entry, fields[name].annotation if name in fields else None, hidden, (*path, name))
            for name, entry in value.items()
            if (*path, name) not in hidden
        }
    if isinstance(value, list):
        if section_of(annotation) is TokenSchedule:
            annotation = TokenSchedule.model_fields["phases"].annotation
        return tuple(_plain(item, item_of(annotation), hidden, (*path, i)) for i, item in enumerate(value))
    kinds = alternatives(annotation)
    if located.text and str in kinds and isinstance(value, (int, float)) and not {int, float, bool} & set(kinds):
        return located.text  # a run may be called 2026
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # strict mode takes no 1e3 for a whole number, but any whole number for a float
    return value


class _Report:
    """Turns one validation's errors into faults, and notes in `hidden` the keys that later validations leave out."""

    def __init__(self, tree: Located, hidden: set[Path]) -> None:
        self.tree, self.hidden = tree, hidden
        self.taken_out = frozenset(hidden)

    def read(self, error: ValidationError) -> list[Fault]:
        faults: list[Fault] = []
        errors = [_Error(self.tree, details) for details in error.errors(include_url=False)]
        errors = [one for one in errors if not (one.kind == "too_short" and one.covers(errors))]
        errors.sort(key=lambda one: one.kind == "missing")  # after the misspelt key that was meant to be it
        for path in dict.fromkeys(one.path for one in errors):
            faults += self._of_one_key([one for one in errors if one.path == path])
        return faults

    def _of_one_key(self, errors: list[_Error]) -> list[Fault]:
        # The members of a union each complain. One that accepts the type but not the value knows best.
        first = next((error for error in errors if error.kind in _BOUNDS), errors[0])
        if isinstance(first.cause, SectionFaults):
            return self._between_keys(first.path, first.cause)
        if self.taken_out:  # then this only follows from what was taken out; without its section the rest is sound
            self._hide(first.path[:-1] or first.path)
            return []
        meant_by_another = first.path in self.hidden
        self._hide(first.path)
        if first.kind == "missing":
            return [] if meant_by_another else [first.fault(f"is required: {first.help()}")]
        if first.kind == "extra_forbidden":
            *above, name = first.path
            message, meant = unknown_key(Config, first.section, dotted(tuple(above)), str(name))
            if meant:
                self.hidden.add((*above, meant))
            return [first.fault(message)]
        return [first.fault(first.message(alone=len(errors) == 1))]

    def _between_keys(self, section: Path, cause: SectionFaults) -> list[Fault]:
        faults = []
        for keys, message in cause.clashes:
            paths: list[Path] = [(*section, *name.split(".")) for name in keys]
            if not any(path[: len(out)] == out for path in paths for out in self.taken_out):
                # Of the keys involved, the line of the one that was written last: on the command line, above a base.
                written = [found for path in paths if (found := self.tree.find(path))] or [self.tree.nearest(paths[0])]
                location = min((found.location for found in written), key=lambda location: location.level)
                faults.append(Fault(location, dotted(paths[0]), message))
            for path in paths:
                self._hide(path)
        return faults

    def _hide(self, path: Path) -> None:
        """Take out a key; for an item of a list, the list."""
        self.hidden.add(next((path[:end] for end, part in enumerate(path) if isinstance(part, int)), path))


class _Error:
    """One of pydantic's errors, in terms of what the user wrote."""

    def __init__(self, tree: Located, details: Any) -> None:
        self.kind: str = details["type"]
        self.context: dict[str, Any] = details.get("ctx", {})
        self.cause: Exception | None = self.context.get("error")
        self.text: str = details["msg"]
        self.location, self.annotation = resolve(Config, details["loc"])
        self.section = section_of(resolve(Config, self.location[:-1])[1]) or Config
        if self.kind == "extra_forbidden":
            self.section = section_of(self.annotation) or Config
            self.location = (*self.location, str(details["loc"][-1]))
        self.path = _as_written(tree, self.location)
        self.written = tree.nearest(self.path)

    def covers(self, errors: list[_Error]) -> bool:
        """Whether another error lies inside this one's value."""
        size = len(self.location)
        return any(len(error.location) > size and error.location[:size] == self.location for error in errors)

    def fault(self, message: str) -> Fault:
        return Fault(self.written.location, dotted(self.path), message)

    def help(self) -> str:
        """One-line help of the key that is missing."""
        return self.section.model_fields[str(self.location[-1])].description or ""

    def message(self, alone: bool) -> str:
        """What is wrong with the value; `alone` says that no other alternative of the key's type complained."""
        if self.cause is not None:
            return str(self.cause)
        shown = self._shown()
        if self.kind in _BOUNDS:
            relation, name = _BOUNDS[self.kind]
            also = "".join(f" or {word}" for word in choices(self.annotation) if not alone)
            return f"must be {relation} {self.context[name]:g}{also}, is {shown}"
        if self.kind == "finite_number":
            return f"must be finite, is {shown}"
        if self.kind == "too_short":
            return "must not be empty"
        if self.kind.endswith(("_type", "_error", "_from_float")):
            return f"expects {in_words(self.annotation)}, got {shown}{self._remedy()}"
        return f"{self.text[:1].lower()}{self.text[1:]}, got {shown}"

    def _shown(self) -> str:
        value = self.written.value
        if isinstance(value, (dict, list)):
            return "a section of keys" if isinstance(value, dict) else "a list"
        return repr(value) if isinstance(value, str) else "null" if value is None else self.written.text or str(value)

    def _remedy(self) -> str:
        value, kinds = self.written.value, set(alternatives(self.annotation))
        if not isinstance(value, str):
            return ""
        if bool in kinds and value.lower() in ("yes", "on", "no", "off"):
            return f" (write {'true' if value.lower() in ('yes', 'on') else 'false'})"
        if kinds & {int, float} and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value.strip(), re.IGNORECASE):
            return " (write the number without quotes)"
        words = [str(word) for word in choices(self.annotation)]
        near = difflib.get_close_matches(value.lower(), words, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def _as_written(tree: Located, path: Path) -> Path:
    """`path` without the parts that a schedule's short forms leave out: `lr: 1` has no `phases`."""
    written: list[str | int] = []
    here = tree
    for index, part in enumerate(path):
        if isinstance(here.value, list) and part == "phases":
            continue
        if not isinstance(here.value, (dict, list)):
            break
        written.append(part)
        below = here.find((part,))
        if below is None:
            return (*written, *path[index + 1 :])
        here = below
    return tuple(written)


def dotted(path: Path) -> str:
    """`optim.lr[2].value`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
