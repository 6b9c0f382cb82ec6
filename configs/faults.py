"""Check of a configuration: every fault in words, at the line that caused it."""

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
    """Return the configuration that `tree` describes, or every fault in the tree.

    While a section has a bad key, neither its keys nor the sections are checked against each other. So the bad keys are
    taken out and the rest is checked again, until no new fault appears. Faults between keys count only where every key
    involved is as the user wrote it.
    """
    faults: list[Fault] = []
    hidden: set[Path] = set()
    while True:
        values = _plain(tree, Config, hidden)
        if ("train",) in hidden:
            values["train"] = {"steps": 1}  # the one section that must be given: without it the rest is not checked
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
        return int(value)  # strict mode refuses 1e3 as a whole number; it accepts a whole number as a float
    return value


class _Report:
    """Faults from the errors of one validation; the keys that later validations leave out are added to `hidden`."""

    def __init__(self, tree: Located, hidden: set[Path]) -> None:
        self.tree, self.hidden = tree, hidden
        self.taken_out = frozenset(hidden)

    def read(self, invalid: ValidationError) -> list[Fault]:
        faults: list[Fault] = []
        errors = [_Error(self.tree, details) for details in invalid.errors(include_url=False)]
        errors = [error for error in errors if not (error.kind == "too_short" and error.covers(errors))]
        errors.sort(key=lambda error: error.kind == "missing")  # a misspelt key explains a missing one, so it is first
        for path in dict.fromkeys(error.path for error in errors):
            faults += self._of_one_key([error for error in errors if error.path == path])
        return faults

    def _of_one_key(self, errors: list[_Error]) -> list[Fault]:
        # Each member of a union has an error. The most exact is of a member that accepts the type, but not the value.
        first = next((error for error in errors if error.kind in _BOUNDS), errors[0])
        if isinstance(first.cause, SectionFaults):
            return self._between_keys(first.path, first.cause)
        if self.taken_out:  # the error follows from keys taken out: take its section out too
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
            if not any(path[: len(bad)] == bad for path in paths for bad in self.taken_out):
                # The line is that of the key that was written last: on the command line, or in the file above a base.
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
    """An error of pydantic, with the key and the value as the user wrote them."""

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
        """Help of the missing key."""
        return self.section.model_fields[str(self.location[-1])].description or ""

    def message(self, alone: bool) -> str:
        """Message on the value; `alone` where the key's type has no other alternative with an error."""
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
    """Return `path` without the parts that a schedule's short forms leave out: `lr: 1` has no `phases`."""
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
    """Return a path in the form `optim.lr[2].value`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
