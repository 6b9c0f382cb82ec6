"""Together `make test` and `make test-long` run every test, and each claim has a test in the first."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from counterflow.tests.order import SECONDS, TOGETHER
from counterflow.tests.tiers import TIERS, Function, Tiers


@pytest.fixture(scope="module")
def recipes(root: Path) -> dict[str, str]:
    """Target of the Makefile, and its commands."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", makefile, re.MULTILINE))


def test_the_short_and_the_long_tests_are_all_tests(recipes: dict[str, str]) -> None:
    every = recipes["test-all"]
    assert "-m pytest" in every and not re.search(r"pytest .*-m|-k|--ignore|--deselect", every)
    assert recipes["test"].replace(' -m "not long"', "") == every
    assert recipes["test-long"].replace(" -m long", "") == every


def test_a_change_lands_when_lint_and_both_tiers_pass(root: Path) -> None:
    lines = (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    made = [line for line in lines if line.startswith("make ")]
    rehearsal = "make prove-gpu REHEARSE=1 OUT=build/rehearsal"
    assert made == ["make lint", rehearsal, "make test", "make test-long"]


def test_every_claim_has_a_test_in_the_short_tier(pytestconfig: pytest.Config) -> None:
    tiers = pytestconfig.stash[TIERS]
    assert tiers.short, "this test itself is one"
    assert tiers.without_a_short_test() == []


def test_a_claim_without_a_short_test_is_found() -> None:
    alone, named, half = (Function("tests/test_x.py", name) for name in ("test_alone", "test_named", "test_half"))
    tiers = Tiers(short={half: 1}, long={alone: 2, named: 1, half: 3}, claims={named: half})
    assert tiers.without_a_short_test() == [alone]
    tiers.claims[alone] = Function("tests/test_y.py", "test_half")  # another file's test of that name
    assert tiers.without_a_short_test() == [alone]


def test_the_order_names_files_that_exist(root: Path) -> None:
    assert [name for name in (*SECONDS, *TOGETHER, *TOGETHER.values()) if not (root / name).is_file()] == []


def test_the_slowest_and_the_skipped_tests_are_printed(root: Path) -> None:
    options = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert {"--durations=10", "-ra", "--strict-markers"} <= set(options["addopts"])
