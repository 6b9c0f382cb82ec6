"""The `data` section."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ..settings import Section, key


class DataConfig(Section):
    """Source of text, and its conversion to token sequences."""

    source: Literal["builtin", "folder"] = key(
        "builtin", "builtin is the standard library of the running Python; folder is any folder of text files"
    )
    path: str | None = key(None, "the folder, for source: folder")
    patterns: tuple[str, ...] = key(
        ("*.txt", "*.md", "*.rst", "*.py"), "file names read from the folder, recursively", min_length=1
    )
    tokenizer: Literal["bytes"] = key("bytes", "bytes: one token per byte, and one that ends a document")
    validation_fraction: float = key(0.05, "share of files held out for validation, chosen by name", gt=0, lt=1)
    cache_dir: str | None = key(None, "folder for tokenised text; null is the user's cache folder")
    prefetch: int = key(2, "micro-batches prepared ahead", unit="micro-batches", ge=0)

    @model_validator(mode="after")
    def _path_belongs_to_folder(self) -> DataConfig:
        if self.source == "folder" and not self.path:
            raise ValueError("source: folder needs `path`, the folder of text files")
        if self.source == "builtin" and self.path is not None:
            # Without this error the run would silently train on other text than the user named.
            raise ValueError(f"path {self.path} is not read with source: builtin; set source: folder or remove `path`")
        return self
