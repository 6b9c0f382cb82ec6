"""The rank grid, against a brute-force search over coordinates."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.layout import Coordinates, Layout, holder_rounds
from counterflow.settings import UsageError

DEGREES = st.integers(1, 6)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pp, edp, ep = draw(DEGREES), draw(DEGREES), draw(DEGREES)
    return Layout(pp * edp * ep, pp, ep, draw(st.integers(1, 9)))


def grid(layout: Layout) -> list[Coordinates]:
    """Coordinates in rank order: ep runs fastest, then edp, then pp."""
    sizes = (range(layout.pp), range(layout.edp), range(layout.ep))
    return [Coordinates(pp, edp, ep) for pp, edp, ep in product(*sizes)]


def alike(layout: Layout, key: Callable[[Coordinates], Hashable]) -> set[tuple[int, ...]]:
    """Ranks whose coordinates have the same `key`, found by comparing all with all."""
    keys = [key(coordinates) for coordinates in grid(layout)]
    return {tuple(rank for rank, other in enumerate(keys) if other == wanted) for wanted in keys}


def as_set(groups: Iterable[list[int]]) -> set[tuple[int, ...]]:
    listed = [tuple(group) for group in groups]
    assert len(set(listed)) == len(listed), "a group is listed twice"
    return set(listed)


@given(layouts())
def test_ranks_and_coordinates_are_each_others_inverse_with_ep_fastest(layout: Layout) -> None:
    assert [layout.coordinates(rank) for rank in range(layout.world_size)] == grid(layout)
    assert [layout.rank(*coordinates) for coordinates in grid(layout)] == list(range(layout.world_size))


@given(layouts())
def test_groups_are_the_ranks_that_share_the_other_coordinates(layout: Layout) -> None:
    assert as_set(layout.ep_groups()) == alike(layout, lambda at: (at.pp, at.edp))
    assert as_set(layout.edp_groups()) == alike(layout, lambda at: (at.pp, at.ep))
    assert as_set(layout.dp_groups()) == alike(layout, lambda at: at.pp)
    assert as_set(layout.pp_groups()) == alike(layout, lambda at: (at.edp, at.ep))


@given(layouts(), st.data())
def test_replicas_are_the_ranks_of_the_holders(layout: Layout, data: st.DataObject) -> None:
    held = tuple(sorted(data.draw(st.sets(st.integers(0, layout.pp - 1), min_size=1))))
    coordinates = grid(layout)
    for rank, here in enumerate(coordinates):
        if here.pp not in held:
            with pytest.raises(AssertionError, match=f"rank {rank} has pipeline rank {here.pp}"):
                layout.replica_ranks(rank, "dp", held)
            continue
        of_stage = [r for r, at in enumerate(coordinates) if at.pp in held]
        assert layout.replica_ranks(rank, "dp", held) == of_stage
        assert layout.replica_ranks(rank, "edp", held) == [r for r in of_stage if coordinates[r].ep == here.ep]


@given(layouts())
def test_replicas_on_one_pipeline_rank_are_its_groups(layout: Layout) -> None:
    for kind, groups in (("dp", layout.dp_groups()), ("edp", layout.edp_groups())):
        for group in groups:
            for rank in group:
                assert layout.replica_ranks(rank, kind, (layout.coordinates(rank).pp,)) == group


@given(st.lists(st.sets(st.integers(0, 7), min_size=1).map(tuple)), st.randoms())
def test_rounds_hold_every_shared_set_once_and_never_two_that_overlap(
    sets: list[tuple[int, ...]], shuffle: Random
) -> None:
    rounds = holder_rounds(sets)
    listed = [held for disjoint in rounds for held in disjoint]
    assert sorted(listed) == sorted({tuple(sorted(held)) for held in sets if len(held) > 1})
    for disjoint in rounds:
        assert len({pp for held in disjoint for pp in held}) == sum(map(len, disjoint))
    shuffled = sets[:]
    shuffle.shuffle(shuffled)
    assert holder_rounds(shuffled) == rounds


def test_mirrored_pairs_take_one_round() -> None:
    assert len(holder_rounds((rank, 15 - rank) for rank in range(8))) == 1


@given(layouts())
def test_degrees_multiply_to_the_world(layout: Layout) -> None:
    assert layout.pp * layout.edp * layout.ep == layout.world_size
    assert layout.dp == layout.ep * layout.edp


@given(layouts())
def test_nodes_are_filled_in_rank_order(layout: Layout) -> None:
    nodes = [layout.node(rank) for rank in range(layout.world_size)]
    assert nodes == sorted(nodes)
    assert len(set(nodes)) == layout.num_nodes
    assert max(map(nodes.count, nodes)) <= layout.gpus_per_node


def test_deepseek_v3_is_16_stages_of_2_replicas_of_64_expert_ranks() -> None:
    v3 = Layout(2048, pp=16, ep=64, gpus_per_node=8)
    assert (v3.edp, v3.dp, v3.num_nodes) == (2, 128, 256)
    # V3 §3.1: 64-way expert parallelism spans 8 nodes.
    assert {len({v3.node(rank) for rank in group}) for group in v3.ep_groups()} == {8}
    assert list(v3.edp_groups())[63] == [63, 127]
    assert v3.coordinates(2047) == (15, 1, 63)


def test_sixteen_thousand_ranks_cost_nothing() -> None:
    large = Layout(16384, pp=16, ep=64)
    assert sum(len(group) for group in large.pp_groups()) == 16384


@given(st.integers(1, 64), DEGREES, st.integers(1, 12))
def test_impossible_grids_are_refused_with_the_numbers_and_the_nearest_that_work(world: int, pp: int, ep: int) -> None:
    if world % (pp * ep) == 0:
        assert Layout(world, pp, ep).world_size == world
        return
    with pytest.raises(UsageError) as refused:
        Layout(world, pp, ep)
    said = str(refused.value)
    assert said.startswith(f"{world} rank") and f"pp {pp} x ep {ep}" in said
    worlds = sorted(size for size in range(1, world + pp * ep + 1) if size % (pp * ep) == 0)
    nearest = [size for size in worlds if size < world][-1:] + [size for size in worlds if size > world][:1]
    offered = re.search(r"nearest that work: (\d+)(?: or (\d+))? ranks", said)
    assert offered is not None
    assert [int(size) for size in offered.groups() if size] == nearest
    other_ep = re.search(r"or parallel\.ep (\d+)$", said)
    possible = [degree for degree in range(1, ep) if world % (pp * degree) == 0]
    assert (int(other_ep[1]) if other_ep else None) == (possible[-1] if possible else None)


@pytest.mark.parametrize("name", ["world_size", "pp", "ep", "gpus_per_node"])
def test_degrees_below_one_are_refused(name: str) -> None:
    degrees = {"world_size": 4, "pp": 1, "ep": 1, "gpus_per_node": 8, name: 0}
    with pytest.raises(UsageError, match=f"{name} is 0: it must be at least 1"):
        Layout(**degrees)


def test_dp_follows_from_the_world_or_must_fit_it() -> None:
    assert Layout.resolve(16, pp=2, ep=4, dp="auto", gpus_per_node=8) == Layout(16, 2, 4, 8)
    assert Layout.resolve(16, pp=2, ep=4, dp=8, gpus_per_node=8) == Layout(16, 2, 4, 8)
    with pytest.raises(UsageError, match=r"pp 2 x parallel\.dp 4 needs 8 ranks, but there are 16: start 8 ranks"):
        Layout.resolve(16, pp=2, ep=4, dp=4, gpus_per_node=8)


@given(st.integers(1, 40), st.integers(2, 12))
def test_dp_that_is_no_multiple_of_ep_is_refused_with_the_nearest_multiples(dp: int, ep: int) -> None:
    if dp % ep == 0:
        return
    with pytest.raises(UsageError) as refused:
        Layout.resolve(dp, 1, ep, dp, 8)
    offered = [int(size) for size in re.findall(r"\d+", str(refused.value).split("nearest that work: dp")[1])]
    multiples = range(ep, dp + ep, ep)
    assert offered == [m for m in multiples if m < dp][-1:] + [m for m in multiples if m > dp][:1]
