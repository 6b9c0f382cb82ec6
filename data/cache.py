"""Tokenised text on disk: built once, read through a memory map.

A cache entry is a folder `CACHE/tokens-FINGERPRINT/` with these files, SPLIT being `train` or `validation`:

- `SPLIT.tokens`: the ids of all documents, each followed by its end of document, little-endian uint16
- `SPLIT.offsets`: the start of each document, and the end, little-endian int64
- `meta.json`: see `Meta`

The folder appears by one rename when it is complete. Any number of processes may build the same entry at once: the
first to finish wins and the others read its files. A folder in CACHE whose name starts with a dot belongs to a build in
progress, or to a build that was killed; the latter may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..settings import UsageError
from .corpus import Document, Source, hold_out
from .dataset import unigram_entropy
from .tokenizer import ByteTokenizer

_FORMAT = 1
_TOKEN_DTYPE = np.dtype("<u2")
_OFFSET_DTYPE = np.dtype("<i8")

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Meta:
    """Content of `meta.json`. `digest` names the tokens and their order; `unigram_entropy` is of the held-out text."""

    tokens: dict[str, int]
    documents: dict[str, int]
    digest: str
    unigram_entropy: float


@dataclass(frozen=True)
class TokenStore:
    """A complete cache entry."""

    folder: Path
    meta: Meta

    def tokens(self, split: Split) -> NDArray[np.uint16]:
        """Read-only memory map of the split's ids, uint16 [T]."""
        # A plain array over the map: np.memmap's own indexing costs several times as much per slice.
        return np.asarray(np.memmap(self.folder / f"{split}.tokens", dtype=_TOKEN_DTYPE, mode="r"))

    def offsets(self, split: Split) -> NDArray[np.int64]:
        """Starts of the documents, and the end: int64 [documents + 1]."""
        return np.fromfile(self.folder / f"{split}.offsets", dtype=_OFFSET_DTYPE).astype(np.int64, copy=False)


def open_store(source: Source, tokenizer: ByteTokenizer, validation_fraction: float, cache_dir: Path) -> TokenStore:
    """Return the tokenised `source` from `cache_dir`; build it first if absent.

    Raises UsageError where the source cannot be read or split, or the cache folder cannot be used.
    """
    target = cache_dir / f"tokens-{_fingerprint(source, tokenizer, validation_fraction)}"
    if not target.exists():
        try:
            _build(source, tokenizer, validation_fraction, target)
        except OSError as error:  # reading the source raises UsageError, so the cache failed
            raise UsageError(
                f"cannot keep tokenised text in {cache_dir}: {error.strerror or error}; set data.cache_dir"
            ) from error
    return TokenStore(target, _read_meta(target))


def _fingerprint(source: Source, tokenizer: ByteTokenizer, validation_fraction: float) -> str:
    """Hexadecimal name of all that the cached files depend on; files count by path, size and time."""
    settings = [_FORMAT, source.kind, str(source.root), tokenizer.version, validation_fraction]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in source.files:
        digest.update(json.dumps([file.name, file.size, file.modified_ns]).encode())
    return digest.hexdigest()[:24]


def _build(source: Source, tokenizer: ByteTokenizer, validation_fraction: float, target: Path) -> None:
    documents = list(source.documents())
    held_out = hold_out([document.name for document in documents], validation_fraction)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        digest = hashlib.sha256()
        training = (document for document in documents if document.name not in held_out)
        validation = (document for document in documents if document.name in held_out)
        sizes = {
            "train": _write_split(unfinished, "train", training, tokenizer, digest),
            "validation": _write_split(unfinished, "validation", validation, tokenizer, digest),
        }
        meta = Meta(
            tokens={split: tokens for split, (tokens, _) in sizes.items()},
            documents={split: count for split, (_, count) in sizes.items()},
            digest=digest.hexdigest(),
            unigram_entropy=unigram_entropy(np.memmap(unfinished / "validation.tokens", dtype=_TOKEN_DTYPE, mode="r")),
        )
        with open(unfinished / "meta.json", "w", encoding="utf-8") as file:
            json.dump(asdict(meta), file, indent=1)
            _flush(file)
        try:
            os.rename(unfinished, target)
        except OSError:
            if not target.exists():  # else another process has finished first, with the same files
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_split(
    folder: Path, split: Split, documents: Iterable[Document], tokenizer: ByteTokenizer, digest: Any
) -> tuple[int, int]:
    """Write a split's two files, add them to `digest`, and return its numbers of tokens and documents."""
    end = np.array([tokenizer.end_of_document], dtype=_TOKEN_DTYPE).tobytes()
    ends = [0]
    with open(folder / f"{split}.tokens", "wb") as file:
        for document in documents:
            ids = tokenizer.encode(document.read()).astype(_TOKEN_DTYPE, copy=False)
            for piece in (ids.data, end):
                file.write(piece)
                digest.update(piece)
            ends.append(ends[-1] + len(ids) + 1)
        _flush(file)
    offsets = np.array(ends, dtype=_OFFSET_DTYPE)
    with open(folder / f"{split}.offsets", "wb") as file:
        file.write(offsets.data)
        _flush(file)
    digest.update(offsets.data)
    return ends[-1], len(ends) - 1


def _flush(file: Any) -> None:
    """Write a file through to the disk. After a crash the rename may otherwise be on the disk without the bytes."""
    file.flush()
    os.fsync(file.fileno())


def _read_meta(folder: Path) -> Meta:
    try:
        meta = Meta(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        for split in ("train", "validation"):
            expected = {
                "tokens": meta.tokens[split] * _TOKEN_DTYPE.itemsize,
                "offsets": (meta.documents[split] + 1) * _OFFSET_DTYPE.itemsize,
            }
            for part, size in expected.items():
                path = folder / f"{split}.{part}"
                if path.stat().st_size != size:
                    raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"the tokenised text in {folder} is damaged ({error}); delete that folder") from error
    return meta
