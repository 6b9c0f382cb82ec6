"""Fixtures of the tests of the repository itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import counterflow
from counterflow.tests.house.imports import modules_of, tracked_files


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, which is the package."""
    return Path(counterflow.__file__).parent


@pytest.fixture(scope="session")
def project_files(root: Path) -> list[Path]:
    """Files that a commit of the working tree would hold, relative to the root."""
    return tracked_files(root)


@pytest.fixture(scope="session")
def package_files(project_files: list[Path]) -> list[Path]:
    """The package's own modules, relative to the root."""
    return modules_of(project_files)
