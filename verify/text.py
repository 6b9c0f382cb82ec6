"""A little text to verify a run on: the beginning of the configured text, or of the running Python's own library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..configs.config import Config
from ..data.config import DataConfig
from ..data.corpus import Source, open_source
from ..data.dataset import OrderedDataset, PackedDataset
from ..data.open import Data
from ..data.tokenizer import ByteTokenizer
from ..settings import UsageError

ENOUGH_BYTES = 1 << 16
LARGEST_FILE = 1 << 22
"""Size in bytes above which a file is not read for its beginning."""

MOST_ENTRIES = 20_000
"""Number of files above which a folder is not listed."""


@dataclass(frozen=True)
class Text:
    """Tokenised documents: ids `[T]`, each document ending in its end-of-document token, and where each starts."""

    tokens: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    origin: str
    """Origin of the text, in words."""

    def data(self, config: Config) -> Data:
        """Samples of a run on this text; order and seed are the configuration's."""
        length, extra = config.batch.sequence_length, 1 + config.model.num_nextn_predict_layers
        train = PackedDataset(self.tokens, self.offsets, length, extra, config.run.seed)
        held_out = OrderedDataset(self.tokens, length, extra)
        return Data(train, held_out, ByteTokenizer(), 0.0, self.origin)


def open_text(config: DataConfig) -> Text:
    """The first documents of the configured text if opening it costs little, else of the built-in text."""
    if config.source != "builtin":
        assert config.path is not None
        reason = _too_many(Path(config.path).expanduser())
        if not reason:
            try:
                return _read(open_source(config), str(config.path))
            except UsageError as error:
                reason = str(error)
        builtin = _read(open_source(DataConfig()), "the built-in text")
        return Text(builtin.tokens, builtin.offsets, f"{builtin.origin}, since {reason}")
    return _read(open_source(config), "the built-in text")


def _too_many(root: Path) -> str:
    entries = (name for _, folders, names in os.walk(root) for name in (*folders, *names))
    many = next(itertools.islice(entries, MOST_ENTRIES, None), None) is not None
    return f"data.path {root} has more than {MOST_ENTRIES:,} files" if many else ""


def _read(source: Source, origin: str) -> Text:
    """Read the first documents. Raises UsageError where there is not enough text."""
    files = tuple(file for file in source.files if file.size <= LARGEST_FILE)
    tokenizer = ByteTokenizer()
    end = np.array([tokenizer.end_of_document], dtype=np.uint16)
    pieces: list[NDArray[np.uint16]] = []
    ends = [0]
    for document in _documents(Source(source.kind, source.root, files)):
        pieces += [tokenizer.encode(document), end]
        ends.append(ends[-1] + len(document) + 1)
        if ends[-1] >= ENOUGH_BYTES:
            break
    if ends[-1] < ENOUGH_BYTES // 8:
        small = "in files that are not too large for this " if len(files) < len(source.files) else ""
        raise UsageError(f"{source.root} has {ends[-1]:,} bytes of text {small}".rstrip())
    return Text(np.concatenate(pieces), np.array(ends, dtype=np.int64), origin)


def _documents(source: Source) -> Iterator[bytes]:
    for document in source.documents():
        # Ends of documents are verified too, so no document may fill the text.
        yield document.read()[: ENOUGH_BYTES // 8]
