"""Lines of text for a terminal: how wide they are, and rows of a name and a text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

WIDTH = 80
"""Columns of everything that is printed for a person."""


def wrap_row(name: str, text: str, indent: int) -> list[str]:
    """`name`, then `text` from column `indent` on, folded at WIDTH."""
    return textwrap.wrap(f"{name:<{indent}}{text}", WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def name_rows(rows: Mapping[str, str]) -> list[str]:
    """Names and texts in two columns, indented by two, one line each however long."""
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]
