"""Types and keys of the configuration in words: the type at a path, the keys of a section, likely misspellings."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..settings import Phase, Section, TokenSchedule
from .located_yaml import Path
from .moved_keys import MOVED_KEYS

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; for any other type, the type alone."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in alternatives(member))
    return (annotation,)


def section_of(annotation: Any) -> type[Section] | None:
    """The section among the alternatives of a type, if there is one."""
    for kind in alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def item_of(annotation: Any) -> Any:
    """Type of the items of a list type, None for other types."""
    for kind in alternatives(annotation):
        if get_origin(kind) in (tuple, list):
            return get_args(kind)[0]
    return None


def value_of(annotation: Any) -> Any:
    """Type of the values of a mapping type, None for other types."""
    for kind in alternatives(annotation):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return None


def choices(annotation: Any) -> tuple[Any, ...]:
    """Values of the literals of a type."""
    return tuple(value for kind in alternatives(annotation) if get_origin(kind) is Literal for value in get_args(kind))


def in_words(annotation: Any) -> str:
    """Return the values that a type accepts in words, for a sentence that begins with "expects"."""
    words: list[str] = []
    for kind in alternatives(annotation):
        if get_origin(kind) is Literal:
            words.extend(str(value) for value in get_args(kind))
        elif get_origin(kind) in (tuple, list):
            words.append(f"a list, each item {in_words(get_args(kind)[0])}")
        elif get_origin(kind) is dict:
            words.append("a mapping")
        elif kind is TokenSchedule:
            words.append("a number or a list of phases")
        elif kind is Phase:
            words.append("a phase ({value: …} or {tokens: …, start: …, end: …})")
        elif section_of(kind):
            words.append("a section of keys")
        else:
            words.append(_WORDS[kind])
    return listed(words)


def listed(words: list[str]) -> str:
    """Join words in the form `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def resolve(root: type[Section], location: Path) -> tuple[Path, Any]:
    """Return the keys of a pydantic error's location, without names of union members, and the type at its end."""
    path: list[str | int] = []
    annotation: Any = root
    for part in location:
        section, item, value = section_of(annotation), item_of(annotation), value_of(annotation)
        if section and isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        elif item is not None and isinstance(part, int):
            annotation = item
        elif value is not None and isinstance(part, str):
            annotation = value
        else:
            continue
        path.append(part)
    return tuple(path), annotation


def all_keys(section: type[Section], above: str = "") -> Iterator[str]:
    """Yield every key of a section and of the sections in it, as dotted paths."""
    for name, field in section.model_fields.items():
        yield above + name
        inner = section_of(field.annotation)
        if inner and inner is not TokenSchedule:
            yield from all_keys(inner, f"{above}{name}.")


def unknown_key(root: type[Section], section: type[Section], above: str, name: str) -> tuple[str, str | None]:
    """Return the message on a key that `section`, found at `above`, does not have, and the key likely meant.

    A key of an earlier version gets the name that it has now.
    """
    full_name = f"{above}.{name}" if above else name
    if full_name in MOVED_KEYS:
        return f"moved to {MOVED_KEYS[full_name]}", None
    own = list(section.model_fields)
    everywhere = list(all_keys(root))
    if name in everywhere and "." in name:
        parent, _, leaf = name.rpartition(".")
        return f"unknown key (write it nested: `{leaf}:` below `{parent}:`)", None
    hints = []
    meant = next(iter(difflib.get_close_matches(name, own, n=1)), None)
    if meant:
        hints.append(f"did you mean {above}.{meant}?" if above else f"did you mean {meant}?")
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == name]
    if elsewhere:
        hints.append(f"{name} is a key of {listed([key.rpartition('.')[0] or 'the top level' for key in elsewhere])}")
    if not hints:
        leaves = {key.rpartition(".")[2]: key for key in reversed(everywhere)}
        hints += [f"did you mean {leaves[near]}?" for near in difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)]
    if not hints:
        listing = "`counterflow config --explain` shows them with their meaning"
        hints = [f"keys of {above or 'the top level'}: {', '.join(own)}" if len(own) <= 12 else listing]
    return f"unknown key ({'; '.join(hints)})", meant
