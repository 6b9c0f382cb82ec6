"""The first words of docstrings: a noun phrase with its noun, or an imperative."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterflow.tests.house.imports import parsed

HEADLESS = frozenset(
    [
        *("What", "Of", "That", "Those", "These", "Where", "How", "Which", "Whose", "As", "Such", "Who", "Whoever"),
        *("It", "They", "Them", "Once", "Besides", "Also", "And", "But"),
    ]
)
"""First words that leave a reader to look for the noun. `What` and `Where` begin a clause in place of a name."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below fields and constants included."""
    for node in ast.walk(tree):
        if not isinstance(node, Documented):
            continue
        if node.body and (text := text_of(node.body[0])) is not None:
            yield node.body[0].lineno, text
        for above, below in zip(node.body, node.body[1:], strict=False):
            text = text_of(below)
            if isinstance(above, ast.Assign | ast.AnnAssign) and text is not None:
                yield below.lineno, text


def text_of(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def is_headless(text: str) -> bool:
    first = text.split(maxsplit=1)[0].strip("`*,.:;()") if text.strip() else ""
    return not first or first in HEADLESS


def test_every_docstring_begins_with_a_noun_or_an_imperative(root: Path, project_files: list[Path]) -> None:
    python = [path for path in project_files if path.suffix == ".py"]
    found = {path: [(line, text) for line, text in docstrings_of(parsed(root / path))] for path in python}
    assert sum(map(len, found.values())) > 2000
    headless = [
        f"{path}:{line}: {text.strip()[:70]}" for path in found for line, text in found[path] if is_headless(text)
    ]
    assert not headless, f"{len(headless)} docstrings without a head\n" + "\n".join(headless)


@pytest.mark.parametrize(
    "text", ["Of the norm.", "What a step costs.", "  That of rank 0", "How often.", "", "`Which`"]
)
def test_the_check_refuses_headless_words(text: str) -> None:
    assert is_headless(text)


def test_the_check_sees_every_kind_of_docstring() -> None:
    source = '''"""Module."""
A = 1
"""Constant."""
class B:
    """Class."""
    field: int = 0
    """Field."""
    def method(self):
        """Method."""
        "not a docstring"
'''
    assert [text for _, text in docstrings_of(ast.parse(source))] == [
        "Module.",
        "Constant.",
        "Class.",
        "Field.",
        "Method.",
    ]
