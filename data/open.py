"""Opening of the data: from the `data` section to samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .cache import open_store
from .config import DataConfig
from .corpus import open_source
from .dataset import OrderedDataset, PackedDataset
from .tokenizer import ByteTokenizer


@dataclass(frozen=True)
class Data:
    """Samples that a run trains and validates on.

    unigram_entropy: nats per token of the held-out text, the lowest loss of a model without context.
    digest: name of the tokens and the split. Ranks on several machines, and a run that resumes, compare the digests to
    check that they read the same text.
    """

    train: PackedDataset
    validation: OrderedDataset
    tokenizer: ByteTokenizer
    unigram_entropy: float
    digest: str


def open_data(config: DataConfig, sequence_length: int, extra: int, seed: int, cache_dir: str | Path) -> Data:
    """Open the configured text, which the first call tokenises into `cache_dir`.

    sequence_length: S, inputs of a sample. extra: tokens that a sample reads past the inputs, 1 + MTP depth.
    Raises UsageError where text is missing, cannot be split, or is too short for one sample.
    """
    tokenizer = ByteTokenizer()
    store = open_store(open_source(config), tokenizer, config.validation_fraction, Path(cache_dir))
    train = PackedDataset(store.tokens("train"), store.offsets("train"), sequence_length, extra, seed)
    validation = OrderedDataset(store.tokens("validation"), sequence_length, extra)
    return Data(train, validation, tokenizer, store.meta.unigram_entropy, store.meta.digest)
