"""Reading of YAML: numbers as people write them, and lines."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.configs.located_yaml import Fault, Located, Location, merge, parse_yaml


def read(text: str) -> Located:
    faults: list[Fault] = []
    tree = parse_yaml(text, Location("f.yaml", 1), faults)
    assert not faults
    assert tree is not None
    return tree


def values(located: Located) -> object:
    if isinstance(located.value, dict):
        return {name: values(entry) for name, entry in located.value.items()}
    if isinstance(located.value, list):
        return [values(item) for item in located.value]
    return located.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("28.1e9", 28.1e9), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0),
        ("012", 12), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"), ("yes", "yes"), ("No", "No"), ("on", "on"),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("'5'", "5"), ('"true"', "true"),
        ("1_000", 1000), ("-.inf", -math.inf), ("0x10", "0x10"), ("1e", "1e"), ("e5", "e5"), ("+7", 7),
        ("1__0", "1__0"), ("!!str 5", "5"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = read(text).value
    assert found == value
    assert type(found) is type(value)


def test_the_stock_reader_falls_into_the_traps_that_ours_avoids() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    assert yaml.safe_load("no") is False
    assert yaml.safe_load("012") == 10
    assert yaml.safe_load("{lr: 1, lr: 2}") == {"lr": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text('aé"\\/🙂\n'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
    )
)
def test_json_reads_as_json_does(value: object) -> None:
    assert values(read(json.dumps(value, indent=1, ensure_ascii=False))) == value


def test_every_value_has_the_line_of_its_key() -> None:
    tree = read("a: 1\nb:\n  # comment\n  c:\n    - x\n    - {d: 1,\n       e: 2}\n")
    lines = {
        ("a",): 1, ("b",): 2, ("b", "c"): 4, ("b", "c", 0): 5, ("b", "c", 1): 6, ("b", "c", 1, "d"): 6,
        ("b", "c", 1, "e"): 7,
    }  # fmt: skip
    for path, line in lines.items():
        found = tree.find(path)
        assert found is not None
        assert found.location == Location("f.yaml", line), path
    assert tree.find(("b", "x")) is None
    assert tree.nearest(("b", "c", 7)).location.line == 4


def test_merge_replaces_all_but_mappings_and_keeps_the_lines_of_both_files() -> None:
    merged = merge(read("\n\na: {b: 1, c: [1, 2]}\nd: 1"), read("a: {c: [3], e: 4}\nd: {f: 1}"))
    assert values(merged) == {"a": {"b": 1, "c": [3], "e": 4}, "d": {"f": 1}}
    assert [merged.nearest(("a", key)).location.line for key in "bce"] == [3, 1, 1]


def test_aliases_are_followed() -> None:
    assert values(read("a: &x {b: 1}\nc: *x")) == {"a": {"b": 1}, "c": {"b": 1}}
