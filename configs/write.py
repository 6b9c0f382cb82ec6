"""Printed forms of a configuration: plain data, YAML that loads again, YAML with help."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..settings import Phase, Section, TokenSchedule
from .config import Config
from .located_yaml import Fault, Location, parse_yaml
from .schema import choices, section_of

_WIDTH = 80
_NOTES_AT = 40


def plain(value: Any) -> Any:
    """Return a configuration, or part of one, as dicts, lists and scalars, with schedules in their short form."""
    if isinstance(value, TokenSchedule):
        only = value.phases[0]
        if len(value.phases) == 1 and only.value is not None and only.tokens is None:
            return only.value
        return [plain(phase) for phase in value.phases]
    if isinstance(value, Phase):
        return _given(value)
    if isinstance(value, dict):
        return {name: _given(item) if isinstance(item, Section) else plain(item) for name, item in value.items()}
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _given(section: Section) -> dict[str, Any]:
    """The keys whose values are not the defaults."""
    fields = type(section).model_fields.items()
    return {name: plain(value) for name, field in fields if (value := getattr(section, name)) != field.default}


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML; loading the text gives an equal configuration."""
    return "\n".join(line for name, section in plain(config).items() for line in _entry(name, section, "")) + "\n"


def explain(config: Config) -> str:
    """Return the whole configuration as YAML with each key's help, unit and default, in 80 columns."""
    lines = []
    for name in Config.model_fields:
        section = getattr(config, name)
        lines += ["", *_comment(_first_line(type(section)), ""), f"{name}:", *_explained(section, "  ")]
    return "\n".join(lines[1:]) + "\n"


def number(value: float) -> str:
    """Write a float so that YAML 1.1 and 1.2 both read it, large and small ones in engineering notation: 28.1e+9."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return repr(value)
    digits = Decimal(repr(value)).normalize()
    exponent = digits.adjusted()
    if exponent > 0:
        exponent -= exponent % 3
    mantissa = f"{digits.scaleb(-exponent):f}"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent:+d}"


def _explained(section: Section, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield from _comment(_help(field), indent)
        notes = _notes(field, value)
        if isinstance(value, Section) and not isinstance(value, TokenSchedule):
            yield _noted(f"{indent}{name}:", notes)
            yield from _explained(value, indent + "  ")
            continue
        first, *rest = _entry(name, plain(value), indent)
        yield _noted(first, notes)
        yield from rest
        inner = section_of(field.annotation)
        if value is None and inner is not None:
            yield from _keys_of(inner, indent + "  ")


def _keys_of(section: type[Section], indent: str) -> Iterator[str]:
    """The keys of a section that is off, as comments."""
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else f"default {_inline(plain(field.default))}"
        yield from _comment(f"{name}: {', '.join(filter(None, [_help(field), _unit(field), default]))}", indent)


def _help(field: FieldInfo) -> str:
    words = [str(word) for word in choices(field.annotation)]
    text = field.description or ""
    return text if all(word in text for word in words) else f"{text} ({' | '.join(words)})"


def _unit(field: FieldInfo) -> str:
    return field.json_schema_extra["unit"] if isinstance(field.json_schema_extra, dict) else ""  # type: ignore[return-value]


def _notes(field: FieldInfo, value: Any) -> str:
    """Unit and default of a key, for a comment behind its value."""
    if field.default is PydanticUndefined:
        default = "required"
    elif field.default == value:
        default = "default"
    elif isinstance(field.default, Section) and not isinstance(field.default, TokenSchedule):
        default = ""
    else:
        default = f"default {_inline(plain(field.default))}"
    return ", ".join(filter(None, [_unit(field), default]))


def _noted(line: str, notes: str) -> str:
    """Return `line` with `notes` behind it, in their column where there is room."""
    noted = f"{line:<{_NOTES_AT}}  # {notes}"
    if len(noted) > _WIDTH:
        noted = f"{line}  # {notes}"
    return line if not notes or len(noted) > _WIDTH else noted


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _entry(name: str, value: Any, indent: str) -> list[str]:
    """Lines of a key with its value, in block style; items of a list are in flow style."""
    if isinstance(value, dict) and value:
        inner = [line for key, item in value.items() for line in _entry(key, item, indent + "  ")]
        return [f"{indent}{_quoted(name)}:", *inner]
    line = f"{indent}{_quoted(name)}: {_inline(value)}"
    if isinstance(value, list) and (len(line) > _WIDTH or any(isinstance(item, dict) for item in value)):
        return [f"{indent}{_quoted(name)}:", *(f"{indent}  - {_inline(item)}" for item in value)]
    return [line]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(name)}: {_inline(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return number(value)
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    """Return text as a YAML scalar, in quotes where a reader could take it for another type."""
    simple = re.fullmatch(r"[A-Za-z_/][\w./~+ -]*", text, re.ASCII) and not text.endswith(" ")
    if simple and text.lower() not in ("yes", "no", "on", "off", "y", "n"):  # words that YAML 1.1 takes for booleans
        faults: list[Fault] = []
        read = parse_yaml(f"- {text}", Location(""), faults)
        if not faults and read and isinstance(read.value, list) and read.value[0].value == text:
            return text
    return yaml.dump(text, default_style='"', width=float("inf"), allow_unicode=True).strip()
