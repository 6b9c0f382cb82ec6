"""Order of the test files, and which of them share a worker.

pytest-xdist gives whole files to its workers, in the order of collection. The files that take longest come first, so
that no worker is left with one of them at the end.
"""

from __future__ import annotations

from typing import Any

import pytest

SECONDS: dict[str, int] = {}
"""Seconds of the files that take longest, one file at a time on one core; a file that is missing counts as 0."""

TOGETHER = {
    "tests/training/test_bad_input.py": "tests/training/test_layouts.py",
    "tests/training/test_batches.py": "tests/training/test_layouts.py",
    "tests/training/test_resume.py": "tests/training/test_layouts.py",
}
"""File, and the file whose worker runs it too, because both look at the same runs."""


def heavy_first(items: list[pytest.Item]) -> None:
    """Sort by the seconds of each item's file, in place; items of equal seconds keep their order."""
    total: dict[str, int] = {}
    for name, seconds in SECONDS.items():
        leader = TOGETHER.get(name, name)
        total[leader] = total.get(leader, 0) + seconds

    def seconds_of(item: pytest.Item) -> int:
        name = item.nodeid.partition("::")[0]
        return total.get(TOGETHER.get(name, name), 0)

    items.sort(key=seconds_of, reverse=True)


def file_scheduling(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` that keeps the order of collection and the files of `TOGETHER` on one worker."""
    from xdist.scheduler import LoadFileScheduling

    class InOrder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return InOrder(config, log)
