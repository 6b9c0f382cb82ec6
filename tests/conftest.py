"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from counterflow.tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's gloo processes: `pool.run(function, world_size, *args)`, see `tests/pool.py`."""
    pool = Pool()
    yield pool
    pool.close()
