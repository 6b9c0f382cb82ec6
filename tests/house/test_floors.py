"""The drawing of the floors is of today's imports."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from graphlib import CycleError
from pathlib import Path

import pytest

from counterflow.tests.house.floors import PICTURE, draw, floors_of, needed, read_house


def test_the_drawing_is_of_the_imports_that_there_are(root: Path) -> None:
    assert (root / PICTURE).read_text(encoding="utf-8") == draw(read_house(root)), "run `make floors`"


def test_every_folder_has_a_role_that_fits_its_box(root: Path) -> None:
    roles = read_house(root).roles
    assert {folder: role for folder, role in roles.items() if not 10 < len(role) <= 48 or "\n" in role} == {}


def test_arrows_that_follow_from_others_are_left_out() -> None:
    arrows = {"c": frozenset("ab"), "b": frozenset("a"), "a": frozenset[str]()}
    assert needed(arrows) == {"c": frozenset("b"), "b": frozenset("a"), "a": frozenset()}
    assert floors_of(arrows) == [["c"], ["b"], ["a"]]
    with pytest.raises(CycleError):
        floors_of({"a": frozenset("b"), "b": frozenset("a")})


def test_the_picture_needs_nothing_from_elsewhere(root: Path) -> None:
    picture = ElementTree.fromstring((root / PICTURE).read_text(encoding="utf-8"))
    links = [value for node in picture.iter() for key, value in node.items() if key.endswith("href")]
    assert not links
