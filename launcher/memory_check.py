"""Check of a run's memory before its first step: every pipeline rank in a dry run, against the memory of its device.

One rank of each pipeline rank runs the command `dryrun` in a process of its own, with the fewest micro-batches that
have the full batch's peak. The run folder keeps the results, so that a run that continues does not wait again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..configs.config import Config
from ..settings import UsageError
from ..training.run_folder import CONFIG_FILE
from .environment import RANK_VARIABLES

if TYPE_CHECKING:
    from ..training.preflight import RunPlan
    from .bootstrap import Process

GIB = 2**30
MEMORY_FILE = "memory.json"

CUDA_GIB = 0.6
"""Context of CUDA, its libraries' workspaces and loaded kernels."""

FRAGMENTATION = 0.03
"""Share of the tensors' bytes that the allocator holds and cannot use."""

CLOSE = 0.05
"""Share of a device's memory that should stay free; with less a run is warned."""

logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """Memory of one pipeline rank."""

    tensors: float
    """Bytes of tensors at the peak."""
    phase: str
    """Phase of the peak."""
    nccl: float = 0.0
    """Estimate of the bytes of NCCL's buffers."""

    @property
    def total(self) -> float:
        """Bytes with the allowances for what is no tensor."""
        return self.tensors * (1 + FRAGMENTATION) + CUDA_GIB * GIB + self.nccl


def check_memory(plan: RunPlan, process: Process) -> None:
    """Raise UsageError if a pipeline rank needs more memory than a device has, and warn where it needs nearly all.

    Every rank calls this, and all raise. Without GPUs nothing is checked, unless `memory.limit_gib` is a number. A dry
    run that fails leaves a warning: it must not keep a run from starting.
    """
    import torch.distributed as dist

    limit = device_limit(plan.config, process)
    if limit is None:
        return
    known: list[Any] = [_read(plan) if process.rank == 0 else None]
    dist.broadcast_object_list(known)
    needs: dict[int, Need] = {pp: Need(*need) for pp, need in known[0].items()}
    at = plan.layout.coordinates(process.rank)
    own = {}
    if at.pp not in needs and at.edp == at.ep == 0:
        own = {at.pp: measure(plan, process.rank)}
    found: list[Any] = [None] * process.world_size
    dist.all_gather_object(found, (limit, own))
    needs |= {pp: need for _, measured in found for pp, need in measured.items() if need is not None}
    if process.rank == 0:
        _write(plan, needs)
    judge(needs, min(limit for limit, _ in found))


def device_limit(config: Config, process: Process) -> float | None:
    """Bytes that the run may take on this rank's device; None if nothing is checked."""
    limit = config.memory.limit_gib
    if limit == "auto":
        if process.device.type != "cuda":
            return None
        import torch

        return float(torch.cuda.get_device_properties(process.device).total_memory)
    return None if limit is None else limit * GIB


def judge(needs: Mapping[int, Need], limit: float) -> None:
    """Compare the pipeline ranks' needs with the bytes of a device. Raises UsageError where one does not fit."""
    if not needs:
        return
    worst = max(needs, key=lambda pp: needs[pp].total)
    need = needs[worst]
    nccl = f", {need.nccl / GIB:.1f} GiB for NCCL" if need.nccl else ""
    figures = (
        f"pipeline rank {worst} needs {need.tensors / GIB:.2f} GiB of tensors at the peak, in {need.phase}: with "
        f"{CUDA_GIB} GiB for CUDA{nccl} and {FRAGMENTATION:.0%} for fragmentation {need.total / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB"
    )
    if need.total > limit:
        raise UsageError(
            f"the run does not fit into its devices' memory: {figures}; set memory.recompute to v3 or full, "
            "batch.micro_sequences lower, or parallel.pp or parallel.ep higher (memory.limit_gib null starts it anyhow)"
        )
    if need.total > limit * (1 - CLOSE):
        logger.warning("memory is nearly all taken: %s", figures)
    else:
        logger.info("memory: %s", figures)


def measure(plan: RunPlan, rank: int) -> Need | None:
    """Memory of `rank` by a dry run in a process of its own; None, with a warning, if it fails."""
    from ..dryrun.extend import fewest_microbatches
    from ..training.communicators import nccl_bytes

    config, layout = plan.config, plan.layout
    number = fewest_microbatches(config, config.batch.microbatches(config.batch.global_sequences, layout.dp))
    command = [
        *(sys.executable, "-P", "-m", "counterflow", "dryrun", str(plan.run_dir / CONFIG_FILE), "--json", "-"),
        *("--world", str(layout.world_size), "--rank", str(rank), "--microbatches", str(number), "--no-layer"),
        *("--set", f"parallel.gpus_per_node={layout.gpus_per_node}"),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logger.info("memory: a dry run of pipeline rank %d begins", layout.coordinates(rank).pp)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        reason = ended.stderr.strip().splitlines()
        logger.warning("memory was not checked: the dry run failed: %s", reason[-1] if reason else ended.returncode)
        return None
    result = json.loads(ended.stdout)
    return Need(result["peak_bytes"], result["peak_phase"], nccl_bytes(config, layout, rank))


def _digest(plan: RunPlan) -> str:
    """Name of everything that the memory depends on."""
    others = {"run", "data", "checkpoint", "train", "log"}
    config = plan.config.model_dump_json(exclude={**dict.fromkeys(others, True), "memory": {"limit_gib"}})
    basis = [config, str(plan.layout), __version__]
    return hashlib.sha256("\n".join(basis).encode()).hexdigest()


def _read(plan: RunPlan) -> dict[int, list[Any]]:
    """Earlier results for the same configuration, by pipeline rank."""
    path: Path = plan.run_dir / MEMORY_FILE
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {int(pp): need for pp, need in record["needs"].items()} if record["digest"] == _digest(plan) else {}


def _write(plan: RunPlan, needs: Mapping[int, Need]) -> None:
    path, record = (
        plan.run_dir / MEMORY_FILE,
        {"digest": _digest(plan), "needs": {str(pp): n for pp, n in needs.items()}},
    )
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)
