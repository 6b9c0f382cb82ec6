"""What can be known to fail before a process is started or a file is written.

Each check raises UsageError with the numbers that clash and what would work; all that fail are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import TypeVar

from ..checkpoint.manifest import Manifest, check_same_model, complete_steps, read_manifest
from ..data.open import Data, open_data
from ..data.tokenizer import ByteTokenizer
from ..parallel.layout import Layout
from ..settings import UsageError
from .config import Config
from .plan_steps import Progress, total_steps

T = TypeVar("T")


@dataclass(frozen=True)
class Flight:
    """A run that can start: its layout, its folder and the checkpoint it goes on from."""

    config: Config
    layout: Layout
    run_dir: Path
    total_steps: int
    data: Data
    checkpoint: Path | None
    progress: Progress

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.total_steps


def preflight(config: Config, world_size: int, ranks_per_node: int, fresh: bool = False) -> Flight:
    """Check a run on `world_size` ranks. `fresh` means that an existing run folder will be moved aside."""
    faults: list[str] = []
    layout = _collect(faults, lambda: _layout(config, world_size, ranks_per_node))
    if layout is not None:
        faults += _batch_faults(config, layout)
    faults += _vocabulary_faults(config)
    data = _collect(faults, lambda: _open_data(config))
    run_dir = Path(config.run.dir).expanduser() / config.run.name
    faults += _folder_faults(run_dir)
    found = None if fresh else _collect(faults, lambda: _latest_checkpoint(config, run_dir))
    if faults:
        raise UsageError(faults[0] if len(faults) == 1 else _list("this run cannot start:", faults))
    assert layout is not None and data is not None
    checkpoint, progress = found if found is not None else (None, Progress())
    return Flight(config, layout, run_dir, total_steps(config), data, checkpoint, progress)


def _open_data(config: Config) -> Data:
    extra = 1 + config.model.num_nextn_predict_layers
    return open_data(config.data, config.batch.sequence_length, extra, config.run.seed, data_cache(config))


def data_cache(config: Config) -> Path:
    """Where tokenised text is kept: `data.cache_dir`, or the user's cache folder."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "counterflow"


def _list(heading: str, faults: list[str]) -> str:
    return "\n".join([heading, *(indent(fault, "  ") for fault in faults)])


def _collect(faults: list[str], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except UsageError as error:
        faults.append(str(error))
        return None


def _layout(config: Config, world_size: int, ranks_per_node: int) -> Layout:
    asked = config.parallel
    if asked.pp > 1:
        raise UsageError(f"parallel.pp is {asked.pp}: this version has no pipeline schedule; set it to 1")
    per_node = ranks_per_node if asked.gpus_per_node == "auto" else asked.gpus_per_node
    try:
        return Layout.resolve(world_size, asked.pp, asked.ep, asked.dp, per_node)
    except UsageError as error:
        # Who forgot --nproc has one process, and is told of it.
        raise UsageError(f"{error} (--nproc N starts N ranks)" if world_size == 1 else str(error)) from None


def _batch_faults(config: Config, layout: Layout) -> list[str]:
    """Global batches that micro-batches on every rank cannot make up exactly."""
    batch = config.batch
    unit = layout.dp * batch.micro_sequences
    sizes = {"batch.global_sequences": batch.global_sequences}
    if batch.ramp is not None:
        sizes |= {"batch.ramp.start": batch.ramp.start, "batch.ramp.increment": batch.ramp.increment}
    made_of = f"{unit} (dp {layout.dp} x batch.micro_sequences {batch.micro_sequences})"
    faults = []
    for key, size in sizes.items():
        if size % unit:
            near = [str(size // unit * unit)] if size > unit else []
            near.append(str((size // unit + 1) * unit))
            faults.append(f"{key} {size} is not a multiple of {made_of}; nearest that work: {' or '.join(near)}")
    return faults


def _folder_faults(run_dir: Path) -> list[str]:
    """A run folder that could not be made or written to."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"run.dir cannot hold this run: {existing} is a file"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"run.dir cannot hold this run: nothing may be written in {existing}"]
    return []


def _vocabulary_faults(config: Config) -> list[str]:
    needed, given = ByteTokenizer().vocab_size, config.model.vocab_size
    if given >= needed:
        return []
    return [f"model.vocab_size is {given}, but data.tokenizer {config.data.tokenizer} has {needed} tokens"]


def _latest_checkpoint(config: Config, run_dir: Path) -> tuple[Path, Progress] | None:
    steps = complete_steps(run_dir / "checkpoints")
    if not steps:
        return None
    path = steps[max(steps)]
    manifest: Manifest = read_manifest(path)
    check_same_model(manifest, config.model.model_dump(mode="json"), path)
    return path, Progress(**{key: manifest.progress[key] for key in ("step", "tokens", "sequences")})
