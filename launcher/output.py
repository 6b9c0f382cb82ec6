"""Output of commands: long lines on standard output, and files."""

from __future__ import annotations

import sys
from pathlib import Path

from ..settings import UsageError

PIECE = 4096  # bytes that POSIX writes to a pipe all at once (PIPE_BUF on Linux)


def print_long(text: str) -> None:
    """Print ASCII in pieces that a pipe takes whole.

    With PYTHONUNBUFFERED set, Python drops the rest of a write that a pipe took in part.
    """
    for start in range(0, len(text), PIECE):
        sys.stdout.write(text[start : start + PIECE])
    print()


def write_page(path: Path, page: str) -> None:
    """Write the page of `--html`. Raises UsageError where the file cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written: {error.strerror}") from error
