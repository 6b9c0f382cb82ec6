"""Fixtures that every test may use, and the order in which the tests run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from counterflow.tests.order import file_scheduling, heavy_first
from counterflow.tests.pool import Pool
from counterflow.tests.tiers import TIERS, Tiers

# An example takes as long as a busy machine makes it.
hypothesis.settings.register_profile("counterflow", deadline=None)
hypothesis.settings.load_profile("counterflow")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that one session starts once and uses for all its tests of several ranks, see `tests/pool.py`."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[TIERS] = Tiers.of(items)
    heavy_first(items, config.rootpath)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return file_scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
