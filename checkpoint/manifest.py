"""What a checkpoint says of itself, readable without torch: which model, how far, which tensors and files.

A checkpoint is a folder `step-N`. Its `manifest.json` is written last, and the folder gets its name only then, so
a folder of that name without a manifest, or with files of another size than it lists, has been damaged since.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..settings import UsageError

FORMAT = 1
MANIFEST = "manifest.json"

# May change between writing and reading: they shape no tensor, and training stages do change them (V3 §4.3).
FREE_MODEL_KEYS = frozenset({"max_position_embeddings", "rope_scaling", "initializer_range"})


@dataclass(frozen=True)
class TensorRecord:
    """One global tensor: its shape, format, and a checksum of its bits that no sharding changes."""

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
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        raw = json.loads(text)
        tensors = {k: TensorRecord(tuple(v["shape"]), v["dtype"], v["checksum"]) for k, v in raw["tensors"].items()}
        return cls(raw["model"], raw["progress"], tensors, raw["files"], raw["format"])


def complete_steps(folder: Path) -> dict[int, Path]:
    """Checkpoints in a run's `checkpoints/` folder by step, in ascending order; unfinished ones are not seen."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := re.fullmatch(r"step-(\d+)", path.name)) is not None:
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of checkpoint `path` against the files beside it. Raises UsageError if torn."""
    others = [p.name for p in complete_steps(path.parent).values() if p != path]
    remedy = f"delete {path} to go on from {others[-1]}" if others else f"delete {path} to start again"
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} is torn: it has no {MANIFEST}; {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"checkpoint {path} is torn: {MANIFEST} cannot be read ({error}); {remedy}") from None
    if manifest.format != FORMAT:
        raise UsageError(f"checkpoint {path} has format {manifest.format}; this version reads format {FORMAT}")
    for name, size in manifest.files.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes"
            raise UsageError(f"checkpoint {path} is torn: {name} {state}, {size} were written; {remedy}")
    return manifest


def check_same_model(manifest: Manifest, model: dict[str, Any], path: Path) -> None:
    """Raise UsageError, with every difference, if the checkpoint was written by a model of another architecture."""
    keys = sorted((manifest.model.keys() | model.keys()) - FREE_MODEL_KEYS)
    differences = [
        f"  model.{key}: {manifest.model.get(key)} in the checkpoint, {model.get(key)} in the config"
        for key in keys
        if manifest.model.get(key) != model.get(key)
    ]
    if differences:
        raise UsageError(
            f"checkpoint {path} is of another model:\n"
            + "\n".join(differences)
            + "\nuse the config it was written with, or another run.name"
        )
