"""Numbers, counted things and rows of text as they are printed."""

from __future__ import annotations

import pytest

from counterflow.report.text.lines import WIDTH, name_rows, wrap_row
from counterflow.report.text.numbers import count, format_bytes, format_count, format_duration, number, plural, share


@pytest.mark.parametrize(
    ("things", "name", "ending", "text"),
    [
        (0, "rank", "s", "0 ranks"),
        (1, "rank", "s", "1 rank"),
        (2, "rank", "s", "2 ranks"),
        (1, "process", "es", "1 process"),
        (3, "process", "es", "3 processes"),
    ],
)
def test_the_name_of_counted_things_fits_their_number(things: int, name: str, ending: str, text: str) -> None:
    assert count(things, name, ending) == text


def test_one_alone_is_singular() -> None:
    assert [plural(value, "copy", "copies") for value in (0, 1, 1.0, 1.5, 2)] == [
        "copies",
        "copy",
        "copy",
        "copies",
        "copies",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (590, "590"),
        (0.12345, "0.1235"),
        (1e-4, "0.0001"),
        (12345.6, "12346"),
        (1e-5, "1.000e-05"),
        (1e15, "1.000e+15"),
    ],
)
def test_numbers_have_four_digits_and_few_exponents(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_are_in_percent() -> None:
    assert (share(0.0), share(0.0702), share(1.0)) == ("0.0%", "7.0%", "100.0%")


def test_rows_have_their_texts_in_one_column_of_at_most_80() -> None:
    assert name_rows({"a": "1", "long name": "2"}) == ["  a          1", "  long name  2"]
    lines = wrap_row("name", " ".join(["word"] * 40), 10)
    assert len(lines) > 1 and all(len(line) <= WIDTH for line in lines)
    assert lines[0].startswith("name      word") and all(line.startswith(" " * 10 + "word") for line in lines[1:])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (987, "987"),
        (12_345, "12.3K"),
        (999_949, "999.9K"),
        (999_960, "1.0M"),
        (671.026e9, "671.0B"),
        (14.8e12, "14.8T"),
    ],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (64.6, "1:05"), (7384, "2:03:04"), (12 * 86400 + 3 * 3600 + 59, "12d 03h"), (float("nan"), "--:--")],
)
def test_durations_read_as_clock_times(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"), (5.5 * 2**40, "5.5 TiB")],
)
def test_bytes_are_short(value: float, text: str) -> None:
    assert format_bytes(value) == text
