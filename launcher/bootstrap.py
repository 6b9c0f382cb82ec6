"""Start of a rank: its device, its threads, and the process group of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ..comm.nccl import nccl_options
from ..settings import UsageError
from .environment import WorkerEnvironment
from .gpu_settings import describe_gpu_settings, gpu_variables, make_deterministic, set_product_precision

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Process:
    """Rank of the run, and the device on which it computes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    settings: str = ""
    """Settings made for GPUs, in words for the log."""


def visible_gpus() -> int:
    """Number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def device_type(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Kind of device on which ranks with this `run.device` would train here; never the CPU where a GPU is visible."""
    if device == "auto":
        return "cuda" if visible_gpus() else "cpu"
    return device


def choose_device(
    device: Literal["auto", "cpu", "cuda"],
    backend: Literal["auto", "gloo", "nccl"],
    local_rank: int,
    local_world_size: int,
) -> tuple[torch.device, Backend]:
    """Device and collective library of a rank, from `run.device` and `comm.backend`.

    `auto` takes a GPU wherever one is visible. A rank that sees a single GPU takes it, because launchers such as srun
    show each rank its own; `refuse_shared_gpu` tells whether they did. With gloo ranks may share GPUs. Raises
    UsageError where the machine lacks what a setting needs.
    """
    gpus = visible_gpus()
    if device_type(device) == "cpu":
        if backend == "nccl":
            raise UsageError("comm.backend nccl needs a GPU for every rank, and these train on the CPU: set it to auto")
        return torch.device("cpu"), "gloo"
    if gpus == 0:
        raise UsageError("run.device is cuda, but torch finds no GPU here: set run.device to auto or cpu")
    if backend == "gloo":
        return torch.device("cuda", local_rank % gpus), "gloo"
    if gpus == 1:
        return torch.device("cuda", 0), "nccl"
    if gpus < local_world_size:
        raise UsageError(
            f"this node has {gpus} GPUs for its {local_world_size} ranks: start {gpus} ranks a node, set run.device "
            "to cpu to train on CPUs, or let ranks share a GPU with comm.backend gloo"
        )
    return torch.device("cuda", local_rank), "nccl"


def refuse_shared_gpu(store: dist.Store, uuid: str, rank: int) -> None:
    """Raise UsageError if another rank has announced in `store` that it computes on the GPU with this `uuid`."""
    first = store.compare_set(f"gpu/{uuid}", "", str(rank)).decode()
    if first != str(rank):
        raise UsageError(
            f"ranks {first} and {rank} see the same single GPU ({uuid}): show each rank one of its own (srun "
            "--gpus-per-task=1, CUDA_VISIBLE_DEVICES), show all of them to every rank, start one rank a GPU, let ranks "
            "share it with comm.backend gloo, or set run.device to cpu"
        )


@contextmanager
def bootstrap(
    worker: WorkerEnvironment,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    backend: Literal["auto", "gloo", "nccl"] = "auto",
    timeout: float = 600.0,
    dumps: Path | None = None,
    deterministic: bool = False,
) -> Iterator[Process]:
    """Join the process group of the run and leave it at the end.

    Args:
        timeout: the longest that a collective may wait for its peers, in seconds (`parallel.timeout`).
        dumps: path of NCCL's records of failed collectives, without the rank's number.
        deterministic: whether kernels on a GPU are ones whose results are the same in every run.

    A process without a launcher is a group of one and needs no rendezvous. Raises UsageError as `choose_device` does.
    """
    assert not dist.is_initialized(), "this process already belongs to a group"
    chosen, library = choose_device(device, backend, worker.local_rank, worker.local_world_size)
    if worker.threads is not None:
        torch.set_num_threads(worker.threads)
    settings = _prepare_gpu(chosen, dumps, deterministic) if chosen.type == "cuda" else ""
    _join(worker, chosen, library, timedelta(seconds=timeout))
    try:
        yield Process(worker.rank, worker.world_size, worker.local_rank, worker.local_world_size, chosen, settings)
    except BaseException:
        # Destroying a group can wait for its other ranks, and they may be waiting for this one.
        if worker.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _prepare_gpu(device: torch.device, dumps: Path | None, deterministic: bool) -> str:
    """Set what CUDA and NCCL read when they start, then start CUDA; returns the settings in words."""
    os.environ.update(gpu_variables(os.environ, dumps, deterministic))
    precision = set_product_precision()
    if deterministic:
        make_deterministic()
    torch.cuda.set_device(device)
    return f"{precision}; {describe_gpu_settings(os.environ)}"


def _join(worker: WorkerEnvironment, device: torch.device, library: Backend, timeout: timedelta) -> None:
    """Make the default group. NCCL's communicator is made at once, and all later groups are split off it."""
    store: dist.Store
    if worker.launcher == "none":
        store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://", worker.rank, worker.world_size, timeout=timeout))
        store.set_timeout(timeout)
    if library == "nccl":
        # NCCL itself would only say "invalid usage", after all ranks have met.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        refuse_shared_gpu(dist.PrefixStore("counterflow", store), uuid, worker.rank)
    dist.init_process_group(
        library,
        store=dist.PrefixStore("default_pg", store),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timeout,
        device_id=device if library == "nccl" else None,
        pg_options=nccl_options(1, timeout) if library == "nccl" else None,
    )
