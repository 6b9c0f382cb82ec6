"""The folder of a run: made, gone on with, or moved aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..settings import UsageError
from .config import Config
from .explain import to_yaml

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


def write_config(run_dir: Path, config: Config) -> list[str]:
    """Write `config.yaml`, fully resolved; returns what differs from the one an earlier start of this run wrote."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run folder {run_dir}: {error.strerror}; set run.dir") from error
    path = run_dir / CONFIG_FILE
    changes = []
    if path.exists():
        before, now = _flatten(yaml.safe_load(path.read_text())), _flatten(yaml.safe_load(to_yaml(config)))
        changes = [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
    aside = path.with_suffix(".yaml.part")
    aside.write_text(to_yaml(config))
    aside.replace(path)
    return changes


def _flatten(tree: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {above: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{above}.{name}" if above else str(name))
    return flat
