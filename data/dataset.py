"""Token sequences from a stream of documents, addressed by a global index.

T tokens, S sequence. `extra` is the number of tokens that a sample reads past its window: 1 + MTP depth, the labels of
the last inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..seeds import named_permutation
from ..settings import UsageError

Tokens = NDArray[np.integer]
_COUNTED_AT_ONCE = 1 << 24


def unigram_entropy(tokens: Tokens) -> float:
    """Entropy of the token frequencies of `tokens` [T], in nats per token.

    No model that ignores context has a lower loss on these tokens. A lower validation loss therefore shows that
    context is used.
    """
    if not len(tokens):
        raise ValueError("the entropy of no tokens is not defined")
    counts = np.zeros(0, dtype=np.int64)
    for begin in range(0, len(tokens), _COUNTED_AT_ONCE):  # bincount widens to int64: 8 bytes per token
        piece = np.bincount(tokens[begin : begin + _COUNTED_AT_ONCE], minlength=len(counts))
        piece[: len(counts)] += counts
        counts = piece
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True)
class _Epoch:
    """Order of one epoch: documents in order, their starts in the stream, windows in order."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    windows: NDArray[np.int64]


class PackedDataset:
    """Endless training samples: document packing, deterministic in (seed, global sample index).

    Each epoch puts the documents in a new order, lays them end to end, cuts the stream in windows of S tokens and
    gives the windows in random order. A sample reads `extra` tokens past its window. Every token is therefore an
    input exactly once per epoch, except for the tail (fewer than S + extra tokens).

    tokens: [T], each document ending in its end-of-document token; may be a memory map, and is never copied whole.
    offsets: int64 [documents + 1], the start of each document, and T.
    Raises UsageError where the text does not fill one window.
    """

    def __init__(self, tokens: Tokens, offsets: NDArray[np.int64], sequence_length: int, extra: int, seed: int) -> None:
        assert (offsets[0], offsets[-1]) == (0, len(tokens)), "offsets do not belong to these tokens"
        self.tokens, self.offsets = tokens, offsets
        self.sequence_length, self.extra, self.seed = sequence_length, extra, seed
        self.windows_per_epoch = _count_windows("training", tokens, sequence_length, extra)
        self._lengths = np.diff(offsets)
        self._epochs: dict[int, _Epoch] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def width(self) -> int:
        """Tokens of a sample, S + extra."""
        return self.sequence_length + self.extra

    def sample(self, index: int, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return sample `index` >= 0 of the run: int64 [S + extra], written to `out` where given."""
        if index < 0:
            raise ValueError(f"samples are counted from 0, got {index}")
        out = np.empty(self.width, dtype=np.int64) if out is None else out
        number, turn = divmod(index, self.windows_per_epoch)
        epoch = self._epochs.get(number) or self._open_epoch(number)
        position = int(epoch.windows[turn]) * self.sequence_length
        piece = int(np.searchsorted(epoch.starts, position, side="right")) - 1
        inside = position - int(epoch.starts[piece])
        filled, width = 0, self.width
        while filled < width:
            document = epoch.documents[piece]
            begin = int(self.offsets[document]) + inside
            count = min(int(self.offsets[document + 1]) - begin, width - filled)
            out[filled : filled + count] = self.tokens[begin : begin + count]
            filled, piece, inside = filled + count, piece + 1, 0
        return out

    def _open_epoch(self, number: int) -> _Epoch:
        documents = named_permutation(self.num_documents, "document order", self.seed, number)
        starts = np.zeros(self.num_documents, dtype=np.int64)
        np.cumsum(self._lengths[documents][:-1], out=starts[1:])
        windows = named_permutation(self.windows_per_epoch, "window order", self.seed, number)
        epoch = _Epoch(documents, starts, windows)
        # Reading moves forward, so two epochs are enough: the current one and, across its end, the next. The old dict
        # is replaced, not changed, because another thread may be reading it.
        self._epochs = {old: table for old, table in self._epochs.items() if abs(old - number) == 1} | {number: epoch}
        if len(self._epochs) > 2:
            del self._epochs[min(self._epochs)]
        return epoch


class OrderedDataset:
    """Held-out samples: windows of a token stream in their order, the same in every run.

    tokens: [T]. Raises UsageError where the text does not fill one window.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, extra: int) -> None:
        self.tokens, self.sequence_length, self.extra = tokens, sequence_length, extra
        self._windows = _count_windows("validation", tokens, sequence_length, extra)

    def __len__(self) -> int:
        return self._windows

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Tokens of a sample, S + extra."""
        return self.sequence_length + self.extra

    def sample(self, index: int, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return window `index`, 0 <= index < len(self): int64 [S + extra], written to `out` where given."""
        if not 0 <= index < self._windows:
            raise IndexError(f"window {index} of {self._windows}")
        out = np.empty(self.width, dtype=np.int64) if out is None else out
        begin = index * self.sequence_length
        out[:] = self.tokens[begin : begin + self.width]
        return out


def _count_windows(split: str, tokens: Tokens, sequence_length: int, extra: int) -> int:
    if sequence_length < 1 or extra < 1:
        raise ValueError(
            f"a sample needs sequence_length >= 1 and extra >= 1 (the next token), got {sequence_length} and {extra}"
        )
    windows = (len(tokens) - extra) // sequence_length
    if windows < 1:
        raise UsageError(
            f"the {split} text has {len(tokens):,} tokens, fewer than the {sequence_length + extra:,} of one sample "
            f"(sequence length {sequence_length:,} and {extra} to predict): add text, "
            f"lower batch.sequence_length{' or raise data.validation_fraction' if split == 'validation' else ''}"
        )
    return windows
