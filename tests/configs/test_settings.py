"""Nearest numbers that work, as error messages offer them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from counterflow.settings import nearest_divisors, nearest_multiples


def neighbours(wanted: int, candidates: list[int]) -> str:
    """Join the largest candidate below `wanted` and the smallest one above."""
    below = [str(value) for value in candidates if value < wanted]
    above = [str(value) for value in candidates if value > wanted]
    return " or ".join((*below[-1:], *above[:1]))


@given(st.integers(-50, 200), st.integers(1, 20), st.integers(-5, 90))
def test_nearest_multiples_are_the_neighbours_among_all_positive_multiples(wanted: int, unit: int, least: int) -> None:
    multiples = [value for value in range(unit, 500, unit) if value >= least]
    assert nearest_multiples(wanted, unit, least) == neighbours(wanted, multiples)


@given(st.integers(-5, 130), st.integers(1, 120))
def test_nearest_divisors_are_the_neighbours_among_all_divisors(wanted: int, number: int) -> None:
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    assert nearest_divisors(wanted, number) == neighbours(wanted, divisors)


def test_examples() -> None:
    assert nearest_multiples(66, 4) == "64 or 68"
    assert nearest_multiples(3, 8) == "8"
    assert nearest_multiples(13, 4, 12) == "12 or 16"
    assert nearest_divisors(5, 12) == "4 or 6"
    assert nearest_divisors(16, 8) == "8"
