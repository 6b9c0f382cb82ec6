"""Manifest of a checkpoint, readable without torch: its model, its progress, its tensors and files.

A checkpoint is a folder `step-N`. Its `manifest.json` is written last, and only then the folder gets its name. A
folder of that name is therefore damaged if it has no manifest, or files of other sizes than the manifest lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..settings import UsageError

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = ".metadata"  # torch.distributed.checkpoint's index of each tensor's parts

# Keys that may change between writing and reading: they shape no tensor, and training stages change them (V3 §4.3).
FREE_MODEL_KEYS = frozenset({"max_position_embeddings", "rope_scaling", "initializer_range"})


# Router of the first checkpoints, which do not record one.
FIRST_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@dataclass(frozen=True)
class TensorRecord:
    """Shape and format of a global tensor, and a checksum of its bits that no sharding changes."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`."""

    model: dict[str, Any]
    progress: dict[str, Any]
    tensors: dict[str, TensorRecord]
    files: dict[str, int]
    """Size in bytes of every other file in the folder."""
    index_digest: str
    """Digest of the index file, without which the other files cannot be read; tensors have separate checksums."""
    format: int = FORMAT

    def to_json(self) -> str:
        """Return the text of the file, which ends with a digest of all other content."""
        content = asdict(self)
        return json.dumps({**content, "digest": _digest(content)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of the file. Raises UsageError for another format; any other error means damage."""
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise UsageError(f"has format {raw['format']}; this version reads format {FORMAT}")
        if raw.pop("digest") != _digest(raw):
            raise ValueError("its digest does not fit")
        tensors = {k: TensorRecord(tuple(v["shape"]), v["dtype"], v["checksum"]) for k, v in raw.pop("tensors").items()}
        return cls(tensors=tensors, **raw)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def complete_steps(folder: Path) -> dict[int, Path]:
    """Checkpoints in a run's `checkpoints/` folder by step, in ascending order, without unfinished ones."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := re.fullmatch(r"step-(\d+)", path.name)) is not None:
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def remedy(path: Path) -> str:
    """Advice for a checkpoint that cannot be read."""
    others = [other.name for other in complete_steps(path.parent).values() if other != path]
    return f"delete {path} to continue from {others[-1]}" if others else f"delete {path} to start again"


def digest_of(path: Path) -> str:
    """Hexadecimal digest of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of checkpoint `path` against its files. Raises UsageError for a torn one."""

    def torn(why: str) -> UsageError:
        return UsageError(f"checkpoint {path} is torn: {why}; {remedy(path)}")

    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise torn(f"it has no {MANIFEST}") from None
    except UsageError as error:
        raise UsageError(f"checkpoint {path} {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise torn(f"{MANIFEST} cannot be read ({error})") from None
    for name, size in manifest.files.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            raise torn(f"{name} is missing" if actual is None else f"{name} has {actual} bytes of {size}")
    if digest_of(path / INDEX) != manifest.index_digest:
        raise torn(f"{INDEX} has been changed")
    return manifest


def check_same_model(manifest: Manifest, model: dict[str, Any], path: Path) -> None:
    """Raise UsageError, with every difference, if the checkpoint was written by a model of another architecture."""
    written = {key: value for key, value in FIRST_ROUTER.items() if key in model} | manifest.model
    differences = [
        f"  model.{key}: {json.dumps(written.get(key))} in the checkpoint, {json.dumps(model.get(key))} in the config"
        for key in sorted((written.keys() | model.keys()) - FREE_MODEL_KEYS)
        if written.get(key) != model.get(key)
    ]
    if differences:
        raise UsageError(
            f"checkpoint {path} is of another model:\n"
            + "\n".join(differences)
            + "\nuse the config it was written with, or another run.name"
        )
