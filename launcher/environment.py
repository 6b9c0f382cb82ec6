"""Environment variables that Counterflow reads: a process's rank, its launcher, its threads, the cache folder.

Only `launcher/` reads the environment; all other folders receive values as arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..settings import UsageError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Numbers of tasks, from srun and mpirun. SLURM_NTASKS does not tell: it is set in a job's script too, which runs once.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PARENT_VARIABLE = "COUNTERFLOW_PARENT"  # process id of the `counterflow` that started this worker


@dataclass(frozen=True)
class WorkerEnvironment:
    """Rank and launcher of one process of a run.

    `launcher` is `none` for a process from a plain shell, and `torchrun` for one from torchrun or from anything that
    sets the same variables. It is `local` for one that `--nproc N` started, in process `parent`. The launcher reads the
    reason of a failure in `error_file`. `threads` is the number of CPU threads; None leaves the choice to torch.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Literal["none", "torchrun", "local"] = "none"
    error_file: Path | None = None
    parent: int | None = None
    threads: int | None = None


def read_environment(environ: Mapping[str, str], nproc: int = 1) -> WorkerEnvironment:
    """Read the rank, world size and launcher of this process from `environ`.

    Raises UsageError where the variables are incomplete or wrong, and where `nproc` processes are to be started
    although torchrun has started this one.
    """
    if not any(name in environ for name in RANK_VARIABLES):
        _refuse_lone_tasks(environ)
        return WorkerEnvironment()
    numbers = {name: _number(environ, name) for name in RANK_VARIABLES}
    rank, world_size, local_rank, local_world_size = numbers.values()
    if rank >= world_size or local_rank >= local_world_size or local_world_size > world_size:
        values = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise UsageError(f"the environment contradicts itself: {values}")
    parent = environ.get(PARENT_VARIABLE)
    if parent is None and nproc > 1:
        raise UsageError(
            f"--nproc {nproc} starts processes of its own, but this is already process {rank} of {world_size} "
            "(RANK and WORLD_SIZE are set): leave out --nproc under torchrun"
        )
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    return WorkerEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        launcher="torchrun" if parent is None else "local",
        error_file=Path(error_file) if error_file else None,
        parent=None if parent is None else int(parent),
        threads=threads_per_process(environ, local_world_size),
    )


def _refuse_lone_tasks(environ: Mapping[str, str]) -> None:
    """Raise UsageError in one of several tasks of srun or mpirun: each would train by itself, all in one folder."""
    for variable in TASK_COUNTS:
        tasks = environ.get(variable, "")
        if tasks.isdecimal() and int(tasks) > 1:
            raise UsageError(
                f"this is one of {tasks} tasks ({variable}), and RANK is not set, so each would train alone: start one "
                "task a node that runs torchrun (srun --ntasks-per-node=1 torchrun --nproc-per-node=… --no-python "
                "counterflow train …), or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT in every task"
            )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None:
        present = " and ".join(each for each in RANK_VARIABLES if each in environ)
        raise UsageError(
            f"the environment sets {present} but not {name}: start with torchrun, or unset {', '.join(RANK_VARIABLES)}"
        )
    if not value.isdecimal():
        raise UsageError(f"the environment sets {name}={value!r}, which is not a rank or a count")
    return int(value)


def threads_per_process(environ: Mapping[str, str], local_world_size: int) -> int:
    """CPU threads of each of `local_world_size` processes: OMP_NUM_THREADS, or an equal share of the cores."""
    chosen = environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    return max(1, usable_cores() // local_world_size)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Folder for tokenised text where `data.cache_dir` sets none: `counterflow` in the user's cache folder."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "counterflow"


def usable_cores() -> int:
    """Number of cores that this process may run on. Taskset and Slurm can make it smaller than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
