"""Micro-batches of one data parallel rank, prepared ahead on a thread.

B sequences of a micro-batch, S sequence, D MTP depth; `dp` ranks share a global batch of n sequences. The samples of a
rank depend on the layout, the stream of samples does not: in every step the ranks' blocks, laid end to end, are samples
start, start + 1, … start + n - 1.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .dataset import OrderedDataset, PackedDataset

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the CPU: tokens int64 [B, S+1+D]; valid bool [B], False for rows that are padding (zeros).

    numbers: number of each row's sample in the run, the same in every layout; -1 for padding.
    """

    tokens: Tensor
    valid: Tensor
    numbers: tuple[int, ...]


def micro_batch_count(sequences: int, dp_size: int, micro_sequences: int) -> int:
    """Number of micro-batches that every rank runs for a global batch of `sequences`."""
    rows_per_rank = -(-sequences // dp_size)
    return -(-rows_per_rank // micro_sequences)


class Loader:
    """Iterator over this rank's micro-batches by step: `for micro_batches in loader`, each a list of Batch.

    plan: (global index of the step's first sample, sequences of its global batch) of every step to come. The plan may
    be endless, and is read ahead. Rank r takes the contiguous block of n / dp samples from start + r * n / dp. Where n
    is not a multiple of dp the blocks are rounded up and the last ones padded. The last micro-batch of a block is
    padded too, so that all ranks run equally many micro-batches of one shape.
    prefetch: micro-batches prepared ahead on a thread, past the end of the step too; 0 prepares each on demand.
    Errors of the plan or the dataset on the thread are raised to the caller when their micro-batch is due. Close a
    loader with a thread, or use it in a `with`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        plan: Iterable[tuple[int, int]],
        *,
        dp_rank: int,
        dp_size: int,
        micro_sequences: int,
        prefetch: int = 0,
    ) -> None:
        def batches() -> Iterator[tuple[Batch, bool]]:
            for start, sequences in plan:
                count = micro_batch_count(sequences, dp_size, micro_sequences)
                samples = range(start, start + sequences)
                step = _rank_batches(dataset, samples, dp_rank, dp_size, micro_sequences)
                for number, batch in enumerate(step, start=1):
                    yield batch, number == count

        self._ahead = _Ahead(batches(), prefetch) if prefetch else None
        self._batches: Iterator[tuple[Batch, bool]] = self._ahead or batches()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Return all micro-batches of the next step; StopIteration after the plan's last."""
        step: list[Batch] = []
        complete = False
        while not complete:
            batch, complete = next(self._batches)
            step.append(batch)
        return step

    def close(self) -> None:
        """Stop the thread and wait for its end. Closing a closed loader does nothing."""
        if self._ahead:
            self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def evaluation_batches(
    dataset: OrderedDataset, sequences: int, dp_rank: int, dp_size: int, micro_sequences: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of an evaluation over `sequences` held-out windows, or all if there are fewer.

    The windows are the same in every layout and spread evenly over the held-out text: a short evaluation is not
    confined to the first file. Every rank gets equally many micro-batches; rows past the last window are padding.
    """
    used = min(sequences, len(dataset))
    windows = [row * len(dataset) // used for row in range(used)]
    return _rank_batches(dataset, windows, dp_rank, dp_size, micro_sequences)


def _rank_batches(
    dataset: PackedDataset | OrderedDataset,
    samples: Sequence[int],
    dp_rank: int,
    dp_size: int,
    micro_sequences: int,
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank's block of `samples`, the indices of a whole global batch."""
    assert 0 <= dp_rank < dp_size, f"no rank {dp_rank} of {dp_size}"
    if not samples or micro_sequences < 1:
        raise ValueError(
            f"a batch needs at least one sequence, got {len(samples)} in micro-batches of {micro_sequences}"
        )
    rows_per_rank = -(-len(samples) // dp_size)
    block = samples[dp_rank * rows_per_rank : (dp_rank + 1) * rows_per_rank]
    for number in range(micro_batch_count(len(samples), dp_size, micro_sequences)):
        tokens = np.zeros((micro_sequences, dataset.width), dtype=np.int64)
        rows = block[number * micro_sequences : (number + 1) * micro_sequences]
        for row, index in enumerate(rows):
            dataset.sample(index, tokens[row])
        numbers = (*rows, *[-1] * (micro_sequences - len(rows)))
        yield Batch(torch.from_numpy(tokens), torch.arange(micro_sequences) < len(rows), numbers)


class _Ahead(Generic[Item]):
    """Iterator over `items` on a thread that stays up to `depth` items ahead of the reader."""

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None  # reason for the end of items: StopIteration at the regular end
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._prepare, name="data loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise ValueError("the loader is closed")
            if not self._ready:
                assert self._error is not None
                raise self._error
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _prepare(self) -> None:
        try:
            while self._has_room():
                item = next(self._items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # any error at all is raised in the reader
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait until there is room for an item; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed
