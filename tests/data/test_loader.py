"""Micro-batches: the same stream in every layout, prepared ahead."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.data.dataset import OrderedDataset, PackedDataset
from counterflow.data.loader import Batch, Loader, evaluation_batches, micro_batch_count

S, EXTRA = 6, 2


@pytest.fixture(scope="module")
def dataset() -> PackedDataset:
    offsets = np.cumsum([0, *range(1, 40)])
    return PackedDataset(np.arange(offsets[-1]), offsets, S, EXTRA, seed=1)


def plan(sizes: list[int], start: int = 0) -> list[tuple[int, int]]:
    """Pairs (start, sequences) of consecutive steps."""
    return list(zip(itertools.accumulate([start, *sizes[:-1]]), sizes, strict=True))


def rows(batches: list[Batch] | Iterator[Batch]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.tokens[batch.valid]]


def stream(dataset: PackedDataset, steps: list[tuple[int, int]], dp: int, micro: int, prefetch: int = 0) -> list:
    """Valid rows, by step and rank, of a run in one layout."""
    loaders = [
        Loader(dataset, steps, dp_rank=rank, dp_size=dp, micro_sequences=micro, prefetch=prefetch) for rank in range(dp)
    ]
    found = []
    for step in zip(*loaders, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1, "ranks must run equally many micro-batches"
        found += [row for micro_batches in step for row in rows(micro_batches)]
    for loader in loaders:
        loader.close()
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.integers(0, 500),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0, 1, 3]),
)
def test_every_layout_ramp_and_resume_point_sees_the_same_stream(
    dataset: PackedDataset, sizes: list[int], start: int, dp: int, micro: int, prefetch: int
) -> None:
    expected = [dataset.sample(g).tolist() for g in range(start, start + sum(sizes))]
    assert stream(dataset, plan(sizes, start), dp, micro, prefetch) == expected


def test_a_rank_takes_a_contiguous_block(dataset: PackedDataset) -> None:
    loader = Loader(dataset, [(100, 12)], dp_rank=2, dp_size=3, micro_sequences=2)
    (step,) = list(loader)
    assert [batch.tokens.shape for batch in step] == [(2, S + EXTRA)] * 2
    assert all(batch.tokens.dtype == torch.int64 and batch.valid.all() for batch in step)
    assert rows(step) == [dataset.sample(g).tolist() for g in range(108, 112)]


def test_uneven_batches_are_padded_to_one_shape(dataset: PackedDataset) -> None:
    valid = []
    for rank in range(3):
        (step,) = list(Loader(dataset, [(0, 7)], dp_rank=rank, dp_size=3, micro_sequences=2))
        assert len(step) == micro_batch_count(7, 3, 2) == 2
        assert all(batch.tokens.shape == (2, S + EXTRA) for batch in step)
        assert all(not batch.tokens[~batch.valid].any() for batch in step)
        valid.append([batch.valid.tolist() for batch in step])
    assert valid == [[[True, True], [True, False]]] * 2 + [[[True, False], [False, False]]]


def test_every_row_has_the_number_of_its_sample_and_padding_none(dataset: PackedDataset) -> None:
    for rank, expected in enumerate([[103, 104, 105, -1], [106, 107, 108, -1], [109, -1, -1, -1]]):
        (step,) = list(Loader(dataset, [(103, 7)], dp_rank=rank, dp_size=3, micro_sequences=2))
        assert [number for batch in step for number in batch.numbers] == expected
        for batch in step:
            found = {
                number: row.tolist() for number, row in zip(batch.numbers, batch.tokens, strict=True) if number >= 0
            }
            assert found == {number: dataset.sample(number).tolist() for number in found}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_is_the_same_in_every_layout(sequences: int, dp: int, micro: int) -> None:
    held_out = OrderedDataset(np.arange(40 * S + EXTRA), S, EXTRA)
    per_rank = [list(evaluation_batches(held_out, sequences, rank, dp, micro)) for rank in range(dp)]
    assert len({len(batches) for batches in per_rank}) == 1
    found = [row for batches in per_rank for row in rows(batches)]
    assert found == rows(evaluation_batches(held_out, sequences, 0, 1, 1))
    assert len(found) == min(sequences, 40)
    starts = [row[0] // S for row in found]
    assert starts[0] == 0
    gaps = np.diff([*starts, 40])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1, "windows are spread evenly over the held-out text"


def test_prefetch_goes_past_the_step_and_no_further_than_asked(dataset: PackedDataset) -> None:
    planned: list[int] = []

    def endless() -> Iterator[tuple[int, int]]:
        for number in itertools.count():
            planned.append(number)
            yield 2 * number, 2

    with Loader(dataset, endless(), dp_rank=0, dp_size=1, micro_sequences=1, prefetch=4) as loader:
        deadline = time.monotonic() + 10
        while len(planned) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert planned == [0, 1], "four micro-batches ahead are two steps"
        for number in range(5):
            assert rows(next(loader)) == [dataset.sample(2 * number + i).tolist() for i in range(2)]


def test_nothing_is_prepared_ahead_without_prefetch(dataset: PackedDataset) -> None:
    threads = threading.active_count()
    planned = iter(plan([2, 2, 2]))
    loader = Loader(dataset, planned, dp_rank=0, dp_size=1, micro_sequences=1, prefetch=0)
    next(loader)
    assert threading.active_count() == threads
    assert next(planned) == (2, 2)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_errors_reach_the_caller_with_their_micro_batch(dataset: PackedDataset, prefetch: int) -> None:
    def failing() -> Iterator[tuple[int, int]]:
        yield 0, 2
        yield 2, 2
        raise OSError("the file server is gone")

    with Loader(dataset, failing(), dp_rank=0, dp_size=1, micro_sequences=1, prefetch=prefetch) as loader:
        assert len(next(loader)) == len(next(loader)) == 2
        with pytest.raises(OSError, match="file server"):
            next(loader)


def test_closing_ends_the_thread_in_any_state(dataset: PackedDataset) -> None:
    before = threading.active_count()
    for consumed in (0, 1):
        loader = Loader(dataset, plan([4] * 100), dp_rank=0, dp_size=1, micro_sequences=1, prefetch=2)
        for _ in range(consumed):
            next(loader)
        loader.close()
        loader.close()
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    finished = Loader(dataset, plan([4]), dp_rank=0, dp_size=1, micro_sequences=1, prefetch=2)
    assert len(list(finished)) == 1
    finished.close()
    assert threading.active_count() == before


def test_an_empty_batch_is_refused(dataset: PackedDataset) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        next(Loader(dataset, [(0, 0)], dp_rank=0, dp_size=1, micro_sequences=1))
