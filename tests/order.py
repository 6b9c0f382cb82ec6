"""Order of the test files, and which of them share a worker.

pytest-xdist gives whole files to its workers, in the order of collection. The files that take longest come first, so
that no worker is left with one of them at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SECONDS: dict[str, int] = {}
"""Seconds of the files that take longest, one file at a time on one core; a file that is missing counts as 0."""

TOGETHER = {
    "tests/training/test_bad_input.py": "tests/training/test_layouts.py",
    "tests/training/test_resume.py": "tests/training/test_layouts.py",
}
"""File, and the file whose worker runs it too, because both look at the same runs."""


def heavy_first(items: list[pytest.Item], root: Path) -> None:
    """Sort by the seconds of each item's file, in place; items of a file keep their order."""
    files = {item.path: item.path.relative_to(root).as_posix() for item in items}
    leaders = {path: TOGETHER.get(name, name) for path, name in files.items()}
    total: dict[str, int] = {}
    for path, name in files.items():
        total[leaders[path]] = total.get(leaders[path], 0) + SECONDS.get(name, 0)
    items.sort(key=lambda item: (-total[leaders[item.path]], leaders[item.path], files[item.path]))


def file_scheduling(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` that keeps the order of collection and the files of `TOGETHER` on one worker."""
    from xdist.scheduler import LoadFileScheduling

    class InOrder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return InOrder(config, log)
