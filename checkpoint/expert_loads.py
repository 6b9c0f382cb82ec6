"""Measured loads of experts: of a run, of a checkpoint, or of a JSON file. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.config import ModelConfig
from ..settings import UsageError
from .manifest import MANIFEST, Manifest, complete_steps, read_manifest

LOADS = "expert_loads"
"""Key of a checkpoint's progress: the `tokens` of each expert of each MoE layer in the last `steps` steps."""
PLACEMENT = "expert_placement"
"""Key of a checkpoint's progress: `ranks`, `nodes`, and `experts`, the expert at each place of each MoE layer.

The key is absent if all experts are in their order.
"""
FORM = 'expected a list with one list of loads per layer, or {"loads": that list, "groups": routing groups}'


@dataclass(frozen=True)
class Loads:
    """Number of tokens that each expert of each MoE layer received."""

    layers: tuple[str, ...]
    """Names of the L MoE layers."""
    tokens: list[list[float]]
    """`[L, E]`."""
    groups: int
    """Number of the router's groups, 1 if groups limit nothing."""
    measured: str
    """Origin of the loads: steps and checkpoint, or the file."""
    decoder: tuple[int, int] | None = None
    """Numbers of dense layers, which come first, and of all decoder layers, without MTP modules; None for a file."""


def read_loads(source: Path) -> Loads:
    """Read the loads of a JSON file, of a checkpoint, or of the newest checkpoint of a run folder.

    Raises UsageError, which states the expected form, if there are no loads.
    """
    if (source / MANIFEST).is_file():
        return _of_checkpoint(source)
    steps = complete_steps(source / "checkpoints")
    if steps:
        return _of_checkpoint(steps[max(steps)])
    if source.is_dir():
        raise UsageError(f"{source} is neither a checkpoint nor a run folder with one in {source}/checkpoints")
    return _of_file(source)


def _of_checkpoint(path: Path) -> Loads:
    manifest: Manifest = read_manifest(path)
    model, progress = ModelConfig.model_validate(manifest.model), manifest.progress
    found = progress.get(LOADS)
    if found is None:
        raise UsageError(f"checkpoint {path} has no expert loads: a version that did not keep them wrote it")
    if not found["tokens"]:
        raise UsageError(f"the model of checkpoint {path} has no mixture-of-experts layers")
    if not found["steps"]:
        raise UsageError(f"checkpoint {path} has the loads of no step yet")
    dense, layers = model.first_k_dense_replace, model.num_hidden_layers
    names = [*map(str, range(dense, layers)), *(f"mtp.{k}" for k in range(len(found["tokens"]) - layers + dense))]
    last = progress["step"]
    return Loads(
        tuple(names),
        found["tokens"],
        model.n_group if model.limits_groups else 1,
        f"steps {last - found['steps'] + 1} to {last}, {path}",
        (dense, layers),
    )


def _of_file(path: Path) -> Loads:
    try:
        given: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: give a run folder, a checkpoint or a JSON file of loads") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    groups = 1
    if isinstance(given, dict):
        unknown = given.keys() - {"loads", "groups"}
        if unknown or "loads" not in given:
            raise UsageError(f"{path}: {FORM}; got the keys {', '.join(map(repr, given)) or 'of nothing'}")
        groups, given = given.get("groups", 1), given["loads"]
        if type(groups) is not int:
            raise UsageError(f"{path}: groups is {json.dumps(groups)}: expected a whole number")
    if not isinstance(given, list) or not given or not all(isinstance(row, list) and row for row in given):
        raise UsageError(f"{path}: {FORM}")
    for number, row in enumerate(given):
        wrong = [load for load in row if type(load) not in (int, float)]
        if wrong:
            raise UsageError(f"{path}: layer {number} has the load {json.dumps(wrong[0])}: expected a number")
        if len(row) != len(given[0]):
            raise UsageError(f"{path}: layer {number} has {len(row)} experts, layer 0 has {len(given[0])}")
    return Loads(tuple(map(str, range(len(given)))), given, groups, str(path))
