"""Habits of the repository that a reader relies on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

MAX_LINES = 400
MAX_LINES_OUTSIDE = 450  # of tests, benchmarks and examples
MAX_FILES = 20  # of a folder, without those below it
MAX_SHARE = 16  # percent of the product's lines in one top folder
PLACES = "|".join(["root", "work", "home", "Users", "mnt"])
# A folder of one machine. After a word or a dot it would be part of a longer path or of an address.
MACHINE_PATH = re.compile(rf"(?<![\w.}}/-])/(?:{PLACES})/\w")
LEFT_BY_A_MERGE = re.compile(r"^(?:<{7}|>{7}|\|{7}) ", re.MULTILINE)


@pytest.fixture(scope="session")
def texts(root: Path, project_files: list[Path]) -> dict[Path, str]:
    """Every text file by its path."""
    return {path: (root / path).read_text(encoding="utf-8") for path in project_files if path.suffix != ".xz"}


def test_no_file_names_a_place_on_somebodys_machine(texts: dict[Path, str]) -> None:
    found = [f"{path}: {match.group()}" for path, text in texts.items() for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n".join(found)
    for example in ("open('/" + "work/x')", "cd /" + "root/x", "see /" + "home/me"):
        assert MACHINE_PATH.search(example)


def test_no_merge_is_left_half_done(texts: dict[Path, str]) -> None:
    assert [str(path) for path, text in texts.items() if LEFT_BY_A_MERGE.search(text)] == []


def lines_of(root: Path, path: Path) -> int:
    return (root / path).read_text(encoding="utf-8").count("\n")


def test_no_python_file_outgrows_one_idea(root: Path, project_files: list[Path], package_files: list[Path]) -> None:
    python = {path: lines_of(root, path) for path in project_files if path.suffix == ".py"}
    limits = {path: MAX_LINES if path in package_files else MAX_LINES_OUTSIDE for path in python}
    assert {str(path): lines for path, lines in python.items() if lines > limits[path]} == {}


def test_no_folder_outgrows_the_house(root: Path, package_files: list[Path]) -> None:
    files = Counter(path.parent.as_posix() for path in package_files)
    assert {folder: count for folder, count in files.items() if count > MAX_FILES} == {}
    lines: Counter[str] = Counter()
    for path in package_files:
        lines[path.parts[0] if len(path.parts) > 1 else "."] += lines_of(root, path)
    shares = {folder: 100 * count / lines.total() for folder, count in lines.items()}
    assert {folder: share for folder, share in shares.items() if share > MAX_SHARE} == {}


def test_contributing_states_the_numbers_that_are_held(root: Path) -> None:
    text = " ".join((root / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    ruff = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "PLR0915" in ruff["select"] and "pylint" not in ruff  # its default: 50 statements
    stated = {
        r"files under (\d+) lines": MAX_LINES,
        r"functions under (\d+) statements": 50,
        r"at most (\d+) files": MAX_FILES,
        r"at most (\d+) %": MAX_SHARE,
    }
    assert {pattern: [int(found) for found in re.findall(pattern, text)] for pattern in stated} == {
        pattern: [number] for pattern, number in stated.items()
    }


def test_make_commands_in_the_documents_exist(root: Path, texts: dict[Path, str]) -> None:
    pages = [path for path in texts if path.suffix == ".md" or path == Path(".ci/run")]
    named = {target for page in pages for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", texts[page], re.MULTILINE)}
    assert {"train", "test", "lint"} <= named
    for target in sorted(named):
        known = subprocess.run(["make", "--dry-run", target], cwd=root, capture_output=True, text=True)
        assert known.returncode == 0, f"make {target}: {known.stderr}"


def test_links_between_documents_lead_somewhere(root: Path, texts: dict[Path, str]) -> None:
    for page in (path for path in texts if path.suffix == ".md"):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", texts[page])
        for target in filter(None, (a or b for a, b in targets)):
            assert ":" in target or (root / page.parent / target).exists(), f"{page}: {target}"


def test_make_help_lists_every_target(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE)) == set(phony.split())


def test_bare_names_of_our_folders_are_banned(root: Path, project_files: list[Path]) -> None:
    ruff = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    banned = ruff["lint"]["flake8-tidy-imports"]["banned-api"]
    python = [path for path in project_files if path.suffix == ".py"]
    ours = {path.parts[0] for path in python if len(path.parts) > 1} | {p.stem for p in python if len(p.parts) == 1}
    assert ours - {"tests", "benchmarks", "docs", "examples", "__init__", "__main__"} <= set(banned)
