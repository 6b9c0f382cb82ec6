"""Tokenised text on disk, and the opening of the data."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import counterflow.data.cache as cache_module
from counterflow.data.cache import Split, TokenStore, open_store
from counterflow.data.config import DataConfig
from counterflow.data.corpus import folder, hold_out
from counterflow.data.dataset import unigram_entropy
from counterflow.data.open import open_data
from counterflow.data.tokenizer import ByteTokenizer
from counterflow.settings import UsageError

# Program that prints enough of the opened data to distinguish two streams.
OPEN_AND_DESCRIBE = """
import hashlib, sys
from counterflow.data.config import DataConfig
from counterflow.data.open import open_data
data = open_data(DataConfig(source="folder", path=sys.argv[1]), 32, 2, seed=7, cache_dir=sys.argv[2])
stream = hashlib.sha256(b"".join(data.train.sample(g).tobytes() for g in range(0, 400, 3)))
print(data.digest, stream.hexdigest(), data.unigram_entropy)
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of forty files, each with its name as text."""
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"<{number:02}>" * (20 + number), encoding="utf-8")
    return root


def open_texts(texts: Path, cache: Path, fraction: float = 0.2) -> TokenStore:
    return open_store(folder(texts, ["*.txt"]), ByteTokenizer(), fraction, cache)


def split_documents(store: TokenStore, split: Split) -> list[bytes]:
    tokens, offsets = store.tokens(split), store.offsets(split)
    assert all(tokens[offsets[1:] - 1] == 256)
    return [bytes(tokens[a : b - 1].astype(np.uint8)) for a, b in itertools.pairwise(offsets)]


def test_splits_hold_every_file_once_and_are_disjoint(texts: Path, tmp_path: Path) -> None:
    store = open_texts(texts, tmp_path / "cache")
    held_out = hold_out([path.name for path in texts.iterdir()], 0.2)
    expected: dict[Split, list[bytes]] = {"train": [], "validation": []}
    for path in sorted(texts.iterdir()):
        expected["validation" if path.name in held_out else "train"].append(path.read_bytes())
    assert {split: split_documents(store, split) for split in expected} == expected
    assert set(expected["train"]).isdisjoint(expected["validation"])


def test_the_second_opening_reads_no_text(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_texts(texts, tmp_path / "cache")

    def refuse(*arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ByteTokenizer, "encode", refuse)
    assert open_texts(texts, tmp_path / "cache") == first
    with pytest.raises(AssertionError, match="tokenised again"):
        open_texts(texts, tmp_path / "cache", fraction=0.3)


def test_changed_text_is_tokenised_again(texts: Path, tmp_path: Path) -> None:
    original = open_texts(texts, tmp_path / "cache")
    file = texts / "05.txt"
    file.write_text("!" * file.stat().st_size, encoding="utf-8")
    os.utime(file, ns=(1, 1))  # a quick rewrite can have the same time
    changed = open_texts(texts, tmp_path / "cache")
    assert changed.folder != original.folder
    assert changed.meta.digest != original.meta.digest
    (texts / "40.txt").write_text("one more", encoding="utf-8")
    assert open_texts(texts, tmp_path / "cache").folder not in (original.folder, changed.folder)


def test_processes_building_at_once_agree(texts: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", OPEN_AND_DESCRIBE, str(texts), str(tmp_path / "cache")]
    builders = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": str(seed)})
        for seed in (1, 2, 3)
    ]
    printed = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    data = open_data(DataConfig(source="folder", path=str(texts)), 32, 2, seed=7, cache_dir=tmp_path / "cache")
    stream = hashlib.sha256(b"".join(data.train.sample(g).tobytes() for g in range(0, 400, 3)))
    assert printed == [f"{data.digest} {stream.hexdigest()} {data.unigram_entropy}\n"] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_slower_of_two_builders_takes_the_others_files(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    winner: list[TokenStore] = []

    def rename_after_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(cache_module.os, "rename", rename)
        winner.append(open_texts(texts, tmp_path / "cache"))  # a second build ends just before this one
        rename(source, target)

    monkeypatch.setattr(cache_module.os, "rename", rename_after_another)
    assert [open_texts(texts, tmp_path / "cache")] == winner
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [winner[0].folder.name]


def test_a_failed_build_leaves_nothing(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(texts, ["*.txt"])
    (texts / "39.txt").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*39\.txt"):
        open_store(source, ByteTokenizer(), 0.2, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_entry_is_named(texts: Path, tmp_path: Path) -> None:
    store = open_texts(texts, tmp_path / "cache")
    os.truncate(store.folder / "train.tokens", 100)
    with pytest.raises(UsageError, match=r"train\.tokens has 100 bytes instead of .* delete that folder") as caught:
        open_texts(texts, tmp_path / "cache")
    assert str(store.folder) in str(caught.value)
    (store.folder / "meta.json").write_text(json.dumps({"tokens": {}}))
    with pytest.raises(UsageError, match="damaged"):
        open_texts(texts, tmp_path / "cache")


def test_an_unusable_cache_folder_is_a_usage_error(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"data\.cache_dir"):
        open_texts(texts, tmp_path / "file" / "cache")


def test_tokens_are_mapped_read_only(texts: Path, tmp_path: Path) -> None:
    tokens = open_texts(texts, tmp_path / "cache").tokens("train")
    assert isinstance(tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_open_data_gives_all_parts(texts: Path, tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(texts), validation_fraction=0.2)
    data = open_data(config, sequence_length=16, extra=3, seed=0, cache_dir=tmp_path / "cache")
    assert data.train.sample(0).shape == data.validation.sample(0).shape == (19,)
    assert data.train.num_documents == 40 - len(hold_out([path.name for path in texts.iterdir()], 0.2))
    text = "".join(path.read_text(encoding="utf-8") for path in texts.iterdir())
    assert data.train.num_tokens + data.validation.num_tokens == len(text) + 40
    counts = Counter(data.validation.tokens.tolist())
    shares = [count / data.validation.num_tokens for count in counts.values()]
    assert math.isclose(data.unigram_entropy, -sum(p * math.log(p) for p in shares), rel_tol=1e-12)


def test_unigram_entropy_of_uniform_tokens_is_the_log_of_their_number() -> None:
    tokens = np.arange(257, dtype=np.uint16).repeat(70_000)  # more than is counted at once
    assert math.isclose(unigram_entropy(tokens), math.log(257), rel_tol=1e-12)


def test_too_little_text_is_a_usage_error_with_numbers(texts: Path, tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(texts), validation_fraction=0.2)
    with pytest.raises(UsageError, match=r"the training text has [\d,]+ tokens, fewer than the 100,002 of one sample"):
        open_data(config, 100_000, 2, seed=0, cache_dir=tmp_path / "cache")
    with pytest.raises(UsageError, match=r"the validation text .* raise data\.validation_fraction"):
        open_data(config, 3000, 2, seed=0, cache_dir=tmp_path / "cache")
