"""The split of layers into stages, against all possible splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.stages import Split, balance, rank_loads, sizes_fault
from counterflow.settings import UsageError

# Sums of these costs are exact, as in `balance`: no tie is broken by rounding.
COSTS = st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.75, 1.0, 2.5, 10.0]), min_size=1, max_size=9)


def every_split(num_layers: int, num_stages: int) -> Iterator[tuple[range, ...]]:
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield tuple(itertools.starmap(range, itertools.pairwise((0, *inner, num_layers))))


def stage_costs(split: tuple[range, ...], costs: list[float], first: float, last: float) -> list[float]:
    sums = [sum(costs[layer] for layer in layers) for layers in split]
    sums[0] += first
    sums[-1] += last
    return sums


@settings(max_examples=300, deadline=None)
@given(COSTS, st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 1.25, 5.0]), st.data())
def test_no_split_has_a_lighter_heaviest_stage_or_is_more_even(
    costs: list[float], first: float, last: float, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    split = balance(costs, first, last, num_stages)
    assert split.num_stages == num_stages
    assert [layer for layers in split.layers for layer in layers] == list(range(len(costs)))
    found = stage_costs(split.layers, costs, first, last)
    others = [stage_costs(other, costs, first, last) for other in every_split(len(costs), num_stages)]
    largest = min(map(max, others))
    assert max(found) == largest
    as_light = [other for other in others if max(other) == largest]
    assert sum(cost * cost for cost in found) == min(sum(c * c for c in other) for other in as_light)


def test_equal_layers_go_evenly_with_the_longer_stages_last() -> None:
    assert balance([1.0] * 8, 0.0, 0.0, 4).sizes == (2, 2, 2, 2)
    assert balance([0.1] * 10, 0.0, 0.0, 4).sizes == (2, 2, 3, 3)


def test_head_and_mtp_leave_fewer_layers_to_the_last_stage() -> None:
    assert balance([1.0] * 61, 0.0, 3.6, 16).sizes == (4,) * 15 + (1,)
    assert balance([1.0] * 6, 2.0, 0.0, 2).sizes == (2, 4)


def test_thousand_layers_on_128_stages_take_no_time() -> None:
    split = balance([1.0 + layer % 3 for layer in range(1000)], 1.0, 5.0, 128)
    assert sum(split.sizes) == 1000


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused_with_the_numbers_that_work(num_stages: int) -> None:
    with pytest.raises(UsageError, match=rf"3 layers cannot make up {num_stages} stages.*: 1 to 3 stages work"):
        balance([1.0] * 3, 0.0, 0.0, num_stages)


def test_negative_costs_are_refused() -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        balance([1.0, -1.0], 0.0, 0.0, 1)


def test_explicit_sizes_give_consecutive_layers() -> None:
    split = Split.of_sizes([2, 1, 3], 6, 3)
    assert split.layers == (range(2), range(2, 3), range(3, 6))
    assert (split.num_stages, split.sizes) == (3, (2, 1, 3))


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        (
            [2, 2],
            "[2, 2] has 2 stages, but the schedule has 3 and 4 layers, but the model has 7 (for example [3, 2, 2])",
        ),
        ([2, 2, 2], "[2, 2, 2] has 6 layers, but the model has 7 (for example [3, 2, 2])"),
        ([0, 3, 4], "[0, 3, 4] has a stage without a layer (for example [3, 2, 2])"),
        ([7], "[7] has 1 stage, but the schedule has 3 (for example [3, 2, 2])"),
        ([3, 2, 2], None),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_an_example(sizes: list[int], fault: str | None) -> None:
    assert sizes_fault(sizes, 7, 3) == fault


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.3]), min_size=8, max_size=16),
    st.sampled_from([0.0, 2.0, 6.0]),
    st.sampled_from(["mirrored", "folded", "interleaved"]),
)
def test_ranks_with_several_stages_are_no_busier_than_by_stages_alone(
    costs: list[float], last: float, form: str
) -> None:
    if form == "mirrored":
        stages_of_rank = [(rank, 3 - rank) for rank in range(4)]
    elif form == "folded":
        stages_of_rank = [(rank, 7 - rank) for rank in range(4)]
    else:
        stages_of_rank = [(rank, rank + 4) for rank in range(4)]
    num_stages = max(map(max, stages_of_rank)) + 1

    def busiest(split: Split) -> float:
        return max(rank_loads(stage_costs(split.layers, costs, 0.0, last), stages_of_rank))

    split = balance(costs, 0.0, last, num_stages, stages_of_rank)
    assert [layer for layers in split.layers for layer in layers] == list(range(len(costs)))
    assert busiest(split) <= busiest(balance(costs, 0.0, last, num_stages)) + 1e-9
    # No further move of a single layer off the busiest rank lowers the largest load.
    loads = rank_loads(stage_costs(split.layers, costs, 0.0, last), stages_of_rank)
    most_busy = [rank for rank, load in enumerate(loads) if load > max(loads) - 1e-9]
    moves = itertools.product(stages_of_rank[most_busy[0]] if len(most_busy) == 1 else (), range(num_stages))
    for a, b in moves:
        sizes = [size - (stage == a) + (stage == b) for stage, size in enumerate(split.sizes)]
        if sizes[a]:
            assert busiest(Split.of_sizes(sizes, len(costs), num_stages)) >= busiest(split) - 1e-9


def test_rank_that_has_both_ends_of_a_folded_pipeline_gets_fewer_layers_at_either() -> None:
    folded = [(rank, 7 - rank) for rank in range(4)]
    assert balance([1.0] * 22, 0.0, 3.6, 8).sizes == (3, 3, 3, 3, 3, 3, 3, 1)
    split = balance([1.0] * 22, 0.0, 3.6, 8, folded)
    assert (split.sizes[0] + split.sizes[7], max(split.sizes)) == (3, 4)


def test_load_of_a_rank_counts_its_share_of_stages_held_twice() -> None:
    assert rank_loads([4.0, 1.0], [(0, 1), (1, 0)]) == [2.5, 2.5]
    assert rank_loads([4.0, 1.0, 2.0], [(0, 2), (1,)]) == [6.0, 1.0]
