"""Conversion of bytes to ids and back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterflow.data.tokenizer import ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_undoes_encoding(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_ids_are_the_bytes_and_fit_the_vocabulary(data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(data)
    assert all(token < tokenizer.end_of_document < tokenizer.vocab_size for token in ids)


def test_decoding_replaces_what_is_not_text() -> None:
    assert tokenizer.decode([104, 105, 256, 33]) == "hi!"
    assert tokenizer.decode([0xC3, 104]) == "\ufffdh"
    assert tokenizer.decode(np.array([[300, 104], [-1, 105]])) == "\ufffdh\ufffdi"
