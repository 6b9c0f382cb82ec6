"""Schedules are found by name, and a user's own works like those that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.parallel.schedule.catalogue import find_schedule, options_of, schedule_names
from counterflow.parallel.schedule.check import ScheduleError, check
from counterflow.parallel.schedule.choose import generate
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.settings import UsageError

MINE = '''
from __future__ import annotations

from dataclasses import dataclass

from counterflow.parallel.schedule.actions import Action, Schedule
from counterflow.settings import UsageError


@dataclass
class Depth:  # a dataclass looks up the module that it is made in
    value: int


def depth_first(num_ranks, num_microbatches, *, depth=1):
    """Goes through the pipeline with `depth` micro-batches at a time."""
    def order(rank):
        for first in range(0, num_microbatches, Depth(depth).value):
            some = range(first, min(first + depth, num_microbatches))
            yield from (Action("F", rank, m) for m in some)
            yield from (Action("B", rank, m) for m in some)
    return Schedule(
        "depth-first", num_ranks, num_ranks, num_microbatches, tuple((r,) for r in range(num_ranks)),
        tuple(tuple(order(rank)) for rank in range(num_ranks)),
    )


def backwards_only(num_ranks, num_microbatches):
    actions = tuple((Action("B", rank, 0),) for rank in range(num_ranks))
    return Schedule("b", num_ranks, num_ranks, num_microbatches, tuple((r,) for r in range(num_ranks)), actions)


def breaks(num_ranks, num_microbatches):
    return [][num_ranks]


def picky(num_ranks, num_microbatches):
    raise UsageError("picky wants 7 ranks")


def nothing(num_ranks, num_microbatches):
    pass


def other_size(num_ranks, num_microbatches):
    return depth_first(num_ranks, 1)


def flat(num_ranks, num_microbatches):
    return Schedule("flat", num_ranks, num_ranks, num_microbatches, tuple(range(num_ranks)), ((),) * num_ranks)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_names_are_those_of_config_and_command_line() -> None:
    assert schedule_names() == ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
    for name in schedule_names():
        assert find_schedule(name)(4, 8).name == name


def test_options_are_the_keyword_only_parameters(mine: Path) -> None:
    assert options_of(find_schedule("interleaved")) == {"stages_per_rank": 2}
    assert options_of(find_schedule("dualpipe")) == {"defer_weights": False}
    assert options_of(find_schedule("1f1b")) == {}
    assert options_of(find_schedule(f"{mine}:depth_first")) == {"depth": 1}


def test_a_users_schedule_is_checked_and_simulated_like_any(mine: Path) -> None:
    schedule = find_schedule(f"{mine}:depth_first")(3, 5, depth=2)
    assert check(schedule).peak == (2, 2, 2)
    # A group of two passes three stages forward and back in 2 + 1 and 4 + 2 steps twice, the last alone.
    assert simulate(schedule, Costs.uniform(3)).step_time == 2 * (4 * 1 + 4 * 2) + 3 * 3
    with pytest.raises(ScheduleError, match="schedule b, rank 0, position 0"):
        check(find_schedule(f"{mine}:backwards_only")(2, 1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("breaks", r"breaks for 4 ranks and 8 micro-batches failed with IndexError: .* \(mine.py, line 34\)$"),
        ("flat", r"schedule flat, rank 0: its stages must be a tuple of numbers, such as \(0,\), not the int 0"),
        ("picky", "^picky wants 7 ranks$"),
        ("nothing", "the function must return a Schedule, not a NoneType"),
        ("other_size", "the function returned one for 4 ranks and 1 micro-batches"),
    ],
)
def test_faults_of_a_users_function_are_reported_as_his(mine: Path, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_schedule(f"{mine}:{function}")(4, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dualpip", "there is no schedule 'dualpip'. Did you mean dualpipe"),
        ("1F1B", "Did you mean 1f1b"),
        ("zero", "There are gpipe, 1f1b, .*path/to/file.py:function"),
        ("absent.py:f", "there is no file .*absent.py"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_schedule(name)


def test_a_file_without_the_function_or_that_breaks_is_refused(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no function 'depht', its functions are depth_first, backwards_only"):
        find_schedule(f"{mine}:depht")
    for text, fault in (
        ("import os\nimport no_such_module_anywhere", r"ModuleNotFoundError: .* \(broken.py, line 2\)$"),
        ("def f(:", r"SyntaxError: .* \(broken.py, line 1\)$"),
    ):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(UsageError, match=rf"broken.py cannot be imported: {fault}"):
            find_schedule(f"{tmp_path / 'broken.py'}:f")


def test_unknown_options_and_empty_pipelines_are_refused() -> None:
    with pytest.raises(UsageError, match="schedule zb1p: option depth is unknown: it takes none"):
        generate("zb1p", 4, 8, {"depth": 1})
    with pytest.raises(UsageError, match="schedule dualpipe: option depth is unknown: it takes defer_weights"):
        generate("dualpipe", 4, 8, {"depth": 1})
    with pytest.raises(UsageError, match="schedule 1f1b for 0 pipeline ranks: there must be at least 1"):
        find_schedule("1f1b")(0, 8)
    with pytest.raises(UsageError, match="schedule 1f1b for -1 micro-batches"):
        find_schedule("1f1b")(4, -1)
