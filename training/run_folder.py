"""Folder of a run: made, continued, or moved aside."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ..configs.config import Config
from ..configs.moved_keys import differences
from ..configs.sections import TrainConfig
from ..configs.write import plain, to_yaml
from ..settings import UsageError

CONFIG_FILE = "config.yaml"


def move_aside(run_dir: Path) -> Path | None:
    """Rename an existing run folder to the first free NAME.1, NAME.2, …; nothing is ever deleted."""
    if not run_dir.exists():
        return None
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    return aside


@contextmanager
def locked(run_dir: Path, patience: float = 5.0) -> Iterator[None]:
    """Lock `run_dir` against training by other processes. One rank of a run holds the lock as long as it trains.

    The lock file lies next to the folder, because the folder may be moved aside. The lock ends with its process,
    however the process ends. A run that was just killed may take a moment to end, so `locked` waits `patience` seconds.
    Raises UsageError if another run holds the lock.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_name(f".{run_dir.name}.lock").open("w") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"another process is training into {run_dir}: wait for it, stop it, or set run.name"
                    ) from None
                time.sleep(0.2)
        yield


def write_config(run_dir: Path, config: Config) -> list[str]:
    """Write `config.yaml`, fully resolved; return the values that an earlier start of this run had differently."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run folder {run_dir}: {error.strerror}; set run.dir") from error
    path = run_dir / CONFIG_FILE
    changes = []
    if path.exists():
        defaults = plain(Config(train=TrainConfig(steps=1)))
        found = differences(yaml.safe_load(path.read_text()), plain(config), defaults)
        changes = [f"{key} {before} -> {now}" for key, (before, now) in found.items()]
    partial = path.with_suffix(".yaml.part")
    partial.write_text(to_yaml(config))
    partial.replace(path)
    return changes
