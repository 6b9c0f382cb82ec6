"""Case of an audit: a configuration in FP8, and the same in the other precisions, all in one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..configs.config import Config
from ..configs.write import plain
from ..fp8.tensor_formats import CLASSES
from ..model.counts import count_parameters
from ..settings import UsageError
from ..training.preflight import RunPlan, prepare_run

HIGH = {"format": "high"}

BYTES_A_PARAMETER = 60
"""Bytes per parameter, about: two trainers (weights, gradients, FP32 masters and sums, moments), three models with FP32
sums."""


@dataclass(frozen=True)
class AuditCase:
    """An audit that can start."""

    plan: RunPlan
    steps: int
    every: int
    """Steps between looks at gradients."""
    against: Literal["bf16", "fp32"]
    folder: Path
    changes: tuple[str, ...]
    """Changes to the configuration of training, in words."""

    @property
    def config(self) -> Config:
        """The configuration with FP8."""
        return self.plan.config

    @property
    def parameters(self) -> int:
        """Number of parameters, MTP modules included."""
        return _parameters(self.config)

    def plain(self, recipe: Literal["bf16", "fp32"]) -> Config:
        """The configuration without FP8."""
        return _with_precision(self.config, {"recipe": recipe, "backend": "emulated"})

    def only(self, kept: frozenset[str]) -> Config:
        """The configuration with `kept` classes of tensors quantised and FP32 for all else, without other rounding."""
        precision = self.config.precision
        off = {name: HIGH for name in CLASSES if name not in kept}
        # A pattern that is given already would keep its place, before patterns that it should override.
        given = {pattern: format for pattern, format in precision.classes.items() if pattern not in off}
        return _with_precision(self.config, {**dict(precision), "high": "fp32", "classes": given | off})


def make_case(
    config: Config,
    steps: int | None,
    every: int | None,
    against: Literal["bf16", "fp32"],
    folder: Path | None,
    cache: Path,
) -> AuditCase:
    """Check an audit; `cache` as in `prepare_run`.

    Raises UsageError for a configuration without FP8, or one that is too large for one process.
    """
    if config.precision.recipe != "fp8":
        raise UsageError(
            f"precision.recipe is {config.precision.recipe}, and an audit compares fp8 with {against}: "
            "set precision.recipe to fp8 (--set precision.recipe=fp8)"
        )
    for name, given in (("--steps", steps), ("--every", every)):
        if given is not None and given < 1:
            raise UsageError(f"{name} is {given}: it must be at least 1")
    _check_memory(config)
    config, changes = _single_process(config)
    plan = prepare_run(config, 1, 1, cache, fresh=True)
    total = steps or plan.total_steps
    where = folder or Path(config.run.dir).expanduser() / f"{config.run.name}-audit"
    return AuditCase(plan, total, min(every or max(1, total // 10), total), against, where, changes)


def _single_process(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The configuration for a single process in which every quantisation can be observed, and the changes made.

    The layout does not change the result, and the backend changes only the rounding.
    """
    tree, changes = plain(config), []
    parallel = config.parallel
    axes = {"pp": parallel.pp, "ep": parallel.ep, "dp": parallel.dp}
    given = [f"{name} {size}" for name, size in axes.items() if size not in (1, "auto")]
    if given:
        tree["parallel"] = {"timeout": parallel.timeout, "dp": 1}
        changes.append(f"a single process instead of {', '.join(given)}")
    if config.precision.backend == "te":
        changes.append("emulated FP8 instead of Transformer Engine, which shows no tensors")
    tree["precision"]["backend"] = "emulated"
    return Config.model_validate(tree), tuple(changes)


def _check_memory(config: Config) -> None:
    parameters, there = _parameters(config), _memory_gib()
    needed = parameters * BYTES_A_PARAMETER / 2**30
    if there is not None and needed > there:
        raise UsageError(
            f"an audit runs in one process and holds the model five times: {parameters / 1e9:.3g}B parameters take "
            f"about {needed:,.0f} GiB, and this machine has {there:,.0f}; audit a smaller model of this shape, with "
            "fewer layers and experts"
        )


def _parameters(config: Config) -> int:
    counts = count_parameters(config.model)
    return counts.total + counts.mtp_module * config.model.num_nextn_predict_layers


def _memory_gib() -> float | None:
    """Memory of the machine in GiB; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def _with_precision(config: Config, precision: Mapping[str, Any]) -> Config:
    tree = plain(config)
    tree["precision"] = dict(precision)
    return Config.model_validate(tree)
