"""The example schedule of docs/pipeline.md, run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.report.pages.timeline import draw_html

PAGE = Path(__file__).parents[3] / "docs" / "pipeline.md"


@pytest.fixture
def name(tmp_path: Path) -> str:
    """The example's name, in a separate file with the page's text."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "my_schedules.py"
    file.write_text(code, encoding="utf-8")
    return f"{file}:two_by_two"


@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 7])
def test_it_is_found_checked_simulated_and_drawn(name: str, ranks: int, microbatches: int) -> None:
    schedule = find_schedule(name)(ranks, microbatches)
    assert max(check(schedule).peak) == min(2, microbatches)
    timeline = simulate(schedule, Costs.uniform(ranks))
    # Groups of two pass down and up one after another: two forwards and two backwards on each rank.
    groups, rest = divmod(microbatches, 2)
    assert timeline.step_time == groups * ((ranks + 1) * 1 + (ranks + 1) * 2) + rest * 3 * ranks
    assert "two by two" in draw_html([("two by two", timeline)])
