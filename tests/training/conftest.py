"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.tests.pool import Pool
from counterflow.tests.training.harness import Runs, tiny, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of text that is the same on every machine."""
    return write_text(tmp_path_factory.mktemp("training") / "text")


@pytest.fixture(scope="session")
def runs(pool: Pool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that several tests share."""
    return Runs(pool, tiny(text), tmp_path_factory.mktemp("runs"))
