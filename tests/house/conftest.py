from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import counterflow

OUTSIDE_THE_PACKAGE = {"tests", "benchmarks", "docs", "examples"}


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(counterflow.__file__).parent


@pytest.fixture(scope="session")
def project_files(root: Path) -> list[Path]:
    """What a commit of the working tree would hold, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in map(Path, filter(None, listed.split("\0"))) if (root / path).is_file())


@pytest.fixture(scope="session")
def package_files(project_files: list[Path]) -> list[Path]:
    """The package's own modules, relative to the root."""
    return [path for path in project_files if path.suffix == ".py" and path.parts[0] not in OUTSIDE_THE_PACKAGE]
