"""Pictures of layouts: every rank and group is drawn as the layout itself lists it."""

from __future__ import annotations

import random
import time

import pytest

from counterflow.parallel.layout import Layout
from counterflow.report.text.layout import draw_layout

V3 = Layout(2048, pp=16, ep=64, gpus_per_node=8)


def random_layout(seed: int) -> Layout:
    draw = random.Random(seed)
    pp, ep, edp = (draw.choice([1, 2, 3, 4, 7, 8, 16]) for _ in range(3))
    return Layout(pp * ep * edp, pp, ep, gpus_per_node=draw.choice([1, 2, 4, 8, 16, 72]))


def drawn_ranks(picture: str) -> list[tuple[int, int, int, int]]:
    """(rank, pp, edp, ep) of every rank drawn in a node's box."""
    rows: dict[str, list[int]] = {"rank": [], "pp": [], "edp": [], "ep": []}
    for line in picture.splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split()
            rows[name] += [int(cell) for cell in cells if cell != "..."]
    return list(zip(*rows.values(), strict=True))


def drawn_groups(picture: str) -> dict[str, list[str]]:
    """Table of groups: name to [members, groups, first group ...]."""
    lines = picture.split("group  members")[1].splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.parametrize("seed", range(40))
def test_ranks_are_drawn_at_their_coordinates_in_the_layout(seed: int) -> None:
    layout = random_layout(seed)
    ranks = drawn_ranks(draw_layout(layout))
    assert ranks
    for rank, *coordinates in ranks:
        assert tuple(coordinates) == layout.coordinates(rank)


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(4, ep=2), Layout(8, pp=2, ep=2, gpus_per_node=4), Layout(20, ep=5)]
)
def test_small_layouts_show_every_rank_once_inside_its_node(layout: Layout) -> None:
    picture = draw_layout(layout)
    assert [rank for rank, *_ in drawn_ranks(picture)] == list(range(layout.world_size))
    boxes = picture.split("+ node ")[1:]
    for box in boxes:
        node = int(box.split()[0])
        assert {layout.node(rank) for rank, *_ in drawn_ranks(box.split("\n\n")[0])} == {node}
    assert len(boxes) == layout.num_nodes


@pytest.mark.parametrize("seed", range(40))
def test_group_sizes_and_numbers_equal_the_layouts_lists(seed: int) -> None:
    layout = random_layout(seed)
    table = drawn_groups(draw_layout(layout))
    listed = {
        "ep": list(layout.ep_groups()),
        "edp": list(layout.edp_groups()),
        "dp": list(layout.dp_groups()),
        "pp": list(layout.pp_groups()),
    }
    assert table.keys() == listed.keys()
    for name, groups in listed.items():
        members, number, *rest = table[name]
        assert (int(members), int(number)) == (len(groups[0]), len(groups))
        first = " ".join(rest)
        if len(groups[0]) <= 2:
            assert first.startswith(", ".join(map(str, groups[0])))


def test_deepseek_v3_shows_its_first_and_last_ranks_and_expert_groups() -> None:
    picture = draw_layout(V3)
    assert picture.startswith("2048 ranks on 256 nodes: pp 16 x edp 2 x ep 64 (dp 128)")
    ranks = [rank for rank, *_ in drawn_ranks(picture)]
    assert ranks == [*range(8), *range(2040, 2048)]
    assert "nodes 1 to 254 likewise" in picture
    grid = [line.split() for line in picture.splitlines()]
    groups = list(V3.ep_groups())  # two per stage
    for stage in (0, 1, 15):
        row = grid.index(["pp", str(stage), "ranks", *(f"{group[0]}-{group[-1]}" for group in groups[2 * stage :][:2])])
        nodes = [sorted({V3.node(rank) for rank in group}) for group in groups[2 * stage :][:2]]
        assert grid[row + 1] == ["nodes", *(f"{spanned[0]}-{spanned[-1]}" for spanned in nodes)]
    table = drawn_groups(picture)
    assert table["pp"][:6] == ["16", "128", "0,", "128,", "...,", "1920"]
    assert table["edp"][:4] == ["2", "1024", "0,", "64"]


@pytest.mark.parametrize("layout", [V3, Layout(16384, pp=32, ep=128), Layout(2**20, pp=2, ep=64, gpus_per_node=72)])
def test_large_layouts_fit_a_screen_and_are_drawn_at_once(layout: Layout) -> None:
    start = time.process_time()
    lines = draw_layout(layout).splitlines()
    assert time.process_time() - start < 0.5  # listing the ranks would take seconds
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("seed", range(40))
def test_pictures_are_ascii_of_at_most_80_columns(seed: int) -> None:
    picture = draw_layout(random_layout(seed))
    assert picture.isascii()
    assert all(len(line) <= 80 and line == line.rstrip() for line in picture.splitlines())
