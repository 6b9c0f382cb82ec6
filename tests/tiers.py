"""Two tiers of tests: `make test` leaves out what is marked `long`, `make test-long` runs only that.

    LAYOUTS = [(2, 1), pytest.param(8, 4, marks=pytest.mark.long)]      # one case of a claim

    @pytest.mark.long(claim="test_two_hops_follow_the_single_process")  # a whole test, and the short one of its claim

Every claim keeps a test in `make test`: a test function has a case that is not long, or its mark names another test of
the same file that has. `tests/house/test_tiers.py` holds this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest


class Function(NamedTuple):
    """A test function: the id of its file, and its name without parameters."""

    file: str
    name: str


@dataclass
class Tiers:
    """Cases of every collected test function, by tier."""

    short: dict[Function, int] = field(default_factory=dict)
    """Number of cases in `make test`."""
    long: dict[Function, int] = field(default_factory=dict)
    """Number of cases that are left to `make test-long`."""
    claims: dict[Function, Function] = field(default_factory=dict)
    """Function of a `long` mark with a `claim`, and the function that the mark names."""

    @classmethod
    def of(cls, items: Iterable[pytest.Item]) -> Tiers:
        """Tiers of all items."""
        tiers = cls()
        for item in items:
            name = getattr(item, "originalname", None) or item.name
            function = Function(item.nodeid.partition("::")[0], name)
            mark = item.get_closest_marker("long")
            cases = tiers.short if mark is None else tiers.long
            cases[function] = cases.get(function, 0) + 1
            if mark is not None and "claim" in mark.kwargs:
                tiers.claims[function] = Function(function.file, mark.kwargs["claim"])
        return tiers

    def without_a_short_test(self) -> list[Function]:
        """Functions whose claim `make test` does not look at."""
        return [f for f in self.long if f not in self.short and self.claims.get(f) not in self.short]


TIERS = pytest.StashKey[Tiers]()
