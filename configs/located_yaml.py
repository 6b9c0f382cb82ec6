"""YAML text as plain values with their locations.

Scalars are read as YAML 1.2 and JSON define them. YAML 1.1, PyYAML's default, reads `1e-4` and `28.1e9` as text, `no`
as false and `012` as ten. PyYAML also lets a second `lr:` silently replace the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import yaml

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Location:
    """Location of a value in the user's input: a line of a file, or a `--set`, which has no lines.

    `level` is the number of files above this one: 0 for the config itself, 1 for its base; -1 for the command line.
    """

    source: str
    line: int | None = None
    level: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """A fault of a configuration; as text `file.yaml:12: model.hidden_size: what is wrong`."""

    location: Location
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.location), self.key, self.message) if part)


@dataclass(frozen=True)
class Located:
    """A value and the location of its key. `text` is a scalar as it was written, None for one in quotes."""

    value: Scalar | dict[str, Located] | list[Located]
    location: Location
    text: str | None = None

    @property
    def mapping(self) -> dict[str, Located]:
        """Entries of a mapping; none for a scalar or a list."""
        return self.value if isinstance(self.value, dict) else {}

    def find(self, path: Path) -> Located | None:
        """Return the value at `path`, None where none was written."""
        found = self
        for part in path:
            if isinstance(found.value, dict) and part in found.value:
                found = found.value[str(part)]
            elif isinstance(found.value, list) and isinstance(part, int) and part < len(found.value):
                found = found.value[part]
            else:
                return None
        return found

    def nearest(self, path: Path) -> Located:
        """Return the deepest value on `path` that was written."""
        return next(found for end in range(len(path), -1, -1) if (found := self.find(path[:end])) is not None)


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with the scalars of YAML 1.2 alone."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own way)


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_DIGITS}", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str, top: Location, faults: list[Fault]) -> Located | None:
    """Read one YAML document (JSON is YAML). Problems are added to `faults`; None where nothing could be read.

    `top` is the location of the text's first line. If `top` has no line, as on the command line, every value is at
    `top`.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = _location(top, mark)
        faults.append(Fault(location, "", f"cannot be read as YAML: {_explain(error)}"))
        return None
    except yaml.YAMLError as error:
        faults.append(Fault(_location(top, None), "", f"cannot be read as YAML: {' '.join(str(error).split())}"))
        return None
    return Located(None, top, "") if node is None else _Builder(top, faults).build(node, top, "")


def _location(top: Location, mark: yaml.Mark | None) -> Location:
    return replace(top, line=None if top.line is None or mark is None else mark.line + 1)


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in problem:
        return f"{problem} (indent with spaces, not with tabs)"
    if "alias" in problem or "anchor" in problem or "directive" in problem:
        return f"{problem} (put text that starts with a special character in quotes)"
    return problem


class _Builder:
    """Builder of `Located` values from PyYAML's nodes; duplicate keys and unknown tags become faults."""

    def __init__(self, top: Location, faults: list[Fault]) -> None:
        self.top, self.faults = top, faults
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, location: Location, key: str) -> Located:
        if any(node is above for above in self.open):
            self.faults.append(Fault(location, key, "is an alias of something it is part of"))
            return Located(None, location)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return Located(self._mapping(node, key), location)
            if isinstance(node, yaml.SequenceNode):
                items = [
                    self.build(item, _location(self.top, item.start_mark), f"{key}[{i}]")
                    for i, item in enumerate(node.value)
                ]
                return Located(items, location)
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, location, key)
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, above: str) -> dict[str, Located]:
        entries: dict[str, Located] = {}
        for key_node, value_node in node.value:
            location = _location(self.top, key_node.start_mark)
            name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            key = f"{above}.{name}" if above else name
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(Fault(location, above, "a key is a single word"))
            elif name in entries:
                first = entries[name].location
                self.faults.append(Fault(location, key, f"is given twice (first on line {first.line})"))
            entries[name] = self.build(value_node, location, key)
        return entries

    def _scalar(self, node: yaml.ScalarNode, location: Location, key: str) -> Located:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        written = text if node.style is None else None
        try:
            if kind == "str":
                return Located(text, location, written)
            if kind == "int":
                return Located(int(text), location, written)
            if kind == "float":
                return Located(float(re.sub(r"\.(?=inf|nan)", "", text.lower())), location, written)
            if kind == "bool":
                return Located(text.lower() == "true", location, written)
            if kind == "null":
                return Located(None, location, written)
        except ValueError:
            pass
        self.faults.append(Fault(location, key, f"cannot be read: {node.tag} {text!r} is not a plain YAML value"))
        return Located(None, location)


def merge(under: Located, over: Located) -> Located:
    """Merge `over` on top of `under`: mappings key by key; anything else, lists included, is replaced whole.

    A merged mapping has its location in the topmost file. So a fault of a section as a whole names a line, not a --set
    of one of its keys.
    """
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    entries = dict(under.value)
    for name, value in over.value.items():
        entries[name] = merge(entries[name], value) if name in entries else value
    return Located(entries, under.location if over.location.line is None else over.location)
