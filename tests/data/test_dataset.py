"""Packing of documents into samples."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.data.dataset import OrderedDataset, PackedDataset
from counterflow.seeds import named_permutation
from counterflow.settings import UsageError

GOLDEN = [7, 5, 0, 4, 1, 6, 3, 2]
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def numbered(lengths: Iterable[int], sequence_length: int, extra: int, seed: int = 0) -> PackedDataset:
    """Dataset in which every token differs from all others: documents 0 1 2 | 3 4 | …"""
    offsets = np.cumsum([0, *lengths])
    return PackedDataset(np.arange(offsets[-1]), offsets, sequence_length, extra, seed)


def epoch_samples(dataset: PackedDataset, epoch: int) -> list[np.ndarray]:
    first = epoch * dataset.windows_per_epoch
    return [dataset.sample(first + place) for place in range(dataset.windows_per_epoch)]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_covers_every_token_once(lengths: list[int], length: int, extra: int, seed: int, epoch: int) -> None:
    if sum(lengths) < length + extra:
        with pytest.raises(UsageError, match=f"{sum(lengths):,} tokens, fewer than the {length + extra:,}"):
            numbered(lengths, length, extra, seed)
        return
    dataset = numbered(lengths, length, extra, seed)
    inputs = np.concatenate([sample[:length] for sample in epoch_samples(dataset, epoch)])
    assert len(np.unique(inputs)) == len(inputs)
    assert sum(lengths) - length - extra < len(inputs) <= sum(lengths) - extra


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_samples_are_cut_from_whole_documents_laid_end_to_end(
    lengths: list[int], length: int, extra: int, seed: int
) -> None:
    if sum(lengths) < length + extra:
        return
    dataset = numbered(lengths, length, extra, seed)
    starts = set(dataset.offsets[:-1].tolist())
    following: dict[int, int] = {}
    for sample in epoch_samples(dataset, 1):
        for token, successor in itertools.pairwise(sample.tolist()):
            assert following.setdefault(token, successor) == successor, "windows and extra tokens are of one stream"
            assert successor == token + 1 if token + 1 not in starts | {sum(lengths)} else successor in starts


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_samples_equal_a_corpus_packed_in_memory(lengths: list[int], length: int, extra: int, seed: int) -> None:
    if sum(lengths) < length + extra:
        return
    dataset = numbered(lengths, length, extra, seed)
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    expected = []
    for epoch in range(2):
        order = named_permutation(len(documents), "document order", seed, epoch)
        stream = np.concatenate([documents[document] for document in order])
        windows = [stream[i : i + length + extra] for i in range(0, len(stream) - length - extra + 1, length)]
        expected += [windows[w] for w in named_permutation(len(windows), "window order", seed, epoch)]
    np.testing.assert_array_equal([dataset.sample(g) for g in range(len(expected))], expected)


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    lengths = [3, 5, 8, 13, 21, 34, 55]
    forward, backward = numbered(lengths, 8, 2, seed=3), numbered(lengths, 8, 2, seed=3)
    indices = range(5 * forward.windows_per_epoch)
    ahead = [forward.sample(g).tolist() for g in indices]
    behind = [backward.sample(g).tolist() for g in reversed(indices)]
    assert ahead == behind[::-1]
    assert ahead != [numbered(lengths, 8, 2, seed=4).sample(g).tolist() for g in indices]
    per_epoch = [ahead[i : i + forward.windows_per_epoch] for i in range(0, len(ahead), forward.windows_per_epoch)]
    assert all(a != b for i, a in enumerate(per_epoch) for b in per_epoch[:i]), "every epoch has an order of its own"


def test_a_sample_is_written_where_asked() -> None:
    dataset = numbered([10, 20], 4, 1)
    rows = np.zeros((2, 5), dtype=np.int64)
    dataset.sample(3, rows[1])
    assert rows.tolist() == [[0] * 5, dataset.sample(3).tolist()]
    with pytest.raises(ValueError, match="counted from 0"):
        dataset.sample(-1)


def test_reading_across_an_epoch_opens_each_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = numbered([10, 20], 4, 1)
    opened: list[int] = []
    open_epoch = dataset._open_epoch

    def record(number: int) -> object:
        opened.append(number)
        return open_epoch(number)

    monkeypatch.setattr(dataset, "_open_epoch", record)
    edge = 3 * dataset.windows_per_epoch
    for _ in range(3):
        for g in range(edge - 2, edge + 2):
            dataset.sample(g)
    assert opened == [2, 3]
    assert len(dataset._epochs) == 2
    dataset.sample(9 * dataset.windows_per_epoch)
    assert list(dataset._epochs) == [9]


def test_orders_never_change_between_versions() -> None:
    # A run resumed by a later version must continue with the same data.
    assert named_permutation(8, "document order", 1234, 0).tolist() == GOLDEN
    assert named_permutation(8, "document order", 1234, 1).tolist() != GOLDEN


def test_orders_are_uniform() -> None:
    seen = np.zeros((5, 5))
    for number in range(4000):
        seen[np.arange(5), named_permutation(5, "uniform", number)] += 1
    # 800 expected in each cell, deviation 25.3
    assert np.all(np.abs(seen - 800) < 5 * 25.3)


def test_validation_windows_come_in_plain_order() -> None:
    dataset = OrderedDataset(np.arange(31, dtype=np.uint16), sequence_length=8, extra=3)
    assert len(dataset) == 3
    for index in range(3):
        assert dataset.sample(index).tolist() == list(range(8 * index, 8 * index + 11))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset.sample(index)


def test_sampling_does_not_read_the_whole_file(tmp_path: Path) -> None:
    size = 1 << 30
    with open(tmp_path / "tokens", "wb") as file:
        file.truncate(size)  # sparse: no room on the disk is needed
    tokens = np.asarray(np.memmap(tmp_path / "tokens", dtype="<u2", mode="r"))
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    dataset = PackedDataset(tokens, np.arange(0, len(tokens) + 1, 1 << 19), 4096, 2, seed=0)
    for g in range(50):
        assert not dataset.sample(g).any()
    assert process.memory_info().rss - before < size // 8
