"""Text to token ids and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class ByteTokenizer:
    """Tokenizer with one token per byte: ids 0-255 are the bytes of UTF-8 text, 256 ends a document."""

    # Part of the fingerprint of tokenised text: change it with every change of `encode`.
    version = "bytes-1"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> NDArray[np.uint16]:
        """Return the token ids of `text`, uint16 [T], without an end of document. Lone surrogates become `?`."""
        data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Any) -> str:
        """Return the text of an array or sequence of ids.

        Ends of documents are left out. Bytes that are not UTF-8 become U+FFFD. So do ids past the vocabulary, which
        occur because a model's output head may have more rows.
        """
        given = np.asarray(ids, dtype=np.int64).reshape(-1)
        given = given[given != self.end_of_document]
        # 0xFF occurs nowhere in UTF-8, so the decoder replaces it.
        known = np.where((given >= 0) & (given < self.end_of_document), given, 0xFF)
        return known.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
