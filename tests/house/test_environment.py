"""Environment variables: only `launcher/` reads them, and all other folders receive values as arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

READERS = {"environ", "environb", "getenv", "getenvb"}


def reads_of_environment(source: str) -> Iterator[int]:
    """Lines that name a reader of the environment, through `os` or imported from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in READERS and ast.unparse(node.value) == "os":
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in READERS)


def test_only_the_launcher_reads_the_environment(root: Path, package_files: list[Path]) -> None:
    reads = {
        f"{path}:{line}"
        for path in package_files
        if path.parts[0] != "launcher"
        for line in reads_of_environment((root / path).read_text(encoding="utf-8"))
    }
    assert not reads, sorted(reads)


def test_every_way_to_read_the_environment_is_found() -> None:
    for source in ("import os\nx = os.environ['A']", "import os\nx = os.getenv('A')", "from os import environ"):
        assert list(reads_of_environment(source)), source
    assert not list(reads_of_environment("def read(environ):\n    return environ.get('A')"))
