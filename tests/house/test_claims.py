"""The README's claims have tests, and the page that lists them is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from counterflow.tests.house.claims import CLAIMS, MEASURED, Proof, all_tests, claims_of, found_by, render


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tests(root: Path) -> list[Proof]:
    return all_tests(root)


def test_every_claim_of_the_readme_has_tests_and_no_other_has(readme: str) -> None:
    claims = [claim.text for claim in claims_of(readme)]
    assert len(claims) == len(set(claims))
    assert claims == list(CLAIMS)  # in the README's order
    assert set(MEASURED) <= set(CLAIMS)
    assert all(CLAIMS.values())


def test_every_pattern_finds_a_test(tests: list[Proof]) -> None:
    lost = [pattern for patterns in CLAIMS.values() for pattern in patterns if not found_by(pattern, tests)]
    assert not lost, "\n".join(lost)


def test_the_page_is_the_one_that_make_claims_writes(root: Path, readme: str, tests: list[Proof]) -> None:
    written = (root / "docs" / "claims.md").read_text("utf-8")
    assert written == render(readme, tests), "docs/claims.md is out of date: run make claims"


def test_a_sentence_without_tests_is_seen() -> None:
    page = (
        "# X\n\n- **One.** Said [here](a.md), with 0.5 of it. And\n  there; too.\n- **Two**: `b.c` last\n\nNot: this.\n"
    )
    texts = [(claim.title, claim.text) for claim in claims_of(page)]
    assert texts == [("One", "Said here, with 0.5 of it"), ("One", "And there"), ("One", "too"), ("Two", "`b.c` last")]


def test_no_test_waits_for_a_gpu(root: Path, project_files: list[Path]) -> None:
    """`make test` leaves out tests/gpu alone, and no other file skips a test where there is no GPU."""
    pytest_options = (root / "pyproject.toml").read_text("utf-8")
    assert 'norecursedirs = [".*", "gpu"]' in pytest_options
    for path in project_files:
        if path.parts[0] == "tests" and path.parts[1] != "gpu" and path.suffix == ".py":
            skips = re.findall(r"skipif\((.*)", (root / path).read_text("utf-8"))
            assert not [skip for skip in skips if "not torch.cuda" in skip], path
