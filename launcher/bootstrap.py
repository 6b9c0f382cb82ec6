"""Start of a rank: its device, its threads, and the process group of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from ..settings import UsageError
from .environment import WorkerEnvironment

logger = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Process:
    """Rank of the run, and the device on which it computes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device


def choose_device(
    device: Literal["auto", "cpu", "cuda"],
    backend: Literal["auto", "gloo", "nccl"],
    local_rank: int,
    local_world_size: int,
) -> tuple[torch.device, Backend]:
    """Device and collective library of a rank, from `run.device` and `comm.backend`.

    `auto` takes GPUs if there is one for each rank of the node. Raises UsageError where the machine lacks what a
    setting needs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        if 0 < gpus < local_world_size:
            logger.warning("training on the CPU: %d GPUs are visible to %d ranks of a node", gpus, local_world_size)
        device = "cuda" if gpus >= local_world_size else "cpu"
    if device == "cpu":
        if backend == "nccl":
            raise UsageError("comm.backend nccl needs a GPU for every rank, and these train on the CPU: set it to auto")
        return torch.device("cpu"), "gloo"
    if gpus == 0:
        raise UsageError("run.device is cuda, but torch finds no GPU here: set run.device to auto or cpu")
    if backend == "gloo":
        return torch.device("cuda", local_rank % gpus), "gloo"
    if gpus < local_world_size:
        raise UsageError(
            f"run.device is cuda and this node has {gpus} GPUs for its {local_world_size} ranks: start {gpus} ranks "
            "a node, set run.device to cpu, or let ranks share a GPU with comm.backend gloo"
        )
    return torch.device("cuda", local_rank), "nccl"


@contextmanager
def bootstrap(
    worker: WorkerEnvironment,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    backend: Literal["auto", "gloo", "nccl"] = "auto",
    timeout: float = 600.0,
) -> Iterator[Process]:
    """Join the process group of the run and leave it at the end.

    `timeout` is the longest that a collective may wait for its peers, in seconds (`parallel.timeout`). A process
    without a launcher is a group of one and needs no rendezvous. Raises UsageError as `choose_device` does.
    """
    assert not dist.is_initialized(), "this process already belongs to a group"
    chosen, library = choose_device(device, backend, worker.local_rank, worker.local_world_size)
    if worker.threads is not None:
        torch.set_num_threads(worker.threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        library,
        store=dist.HashStore() if worker.launcher == "none" else None,  # None: the launcher's store
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=chosen if library == "nccl" else None,
    )
    try:
        yield Process(worker.rank, worker.world_size, worker.local_rank, worker.local_world_size, chosen)
    except BaseException:
        # Destroying a group can wait for its other ranks, and they may be waiting for this one.
        if worker.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
