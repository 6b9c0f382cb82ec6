"""`counterflow train CONFIG`: training in this process, in local processes (`--nproc`), or in torchrun's workers."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ...configs.load import load_config
from ...settings import UsageError
from ...training.preflight import RunPlan, prepare_run
from ...training.run_folder import locked, move_aside, write_config
from ..environment import WorkerEnvironment, cache_folder, read_environment
from .options import add_config_arguments

if TYPE_CHECKING:
    from ..bootstrap import Process

logger = logging.getLogger(__name__)

DUMPS = "nccl-"
"""First part of the names of NCCL's records in the folder of logs, before the rank's number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="start N processes on this machine")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder aside and start again")
    parser.add_argument("--json", action="store_true", help="end with the result as one JSON line on standard output")


def run(args: argparse.Namespace) -> int:
    """Train; an unfinished run of the same name continues from its last checkpoint."""
    if args.nproc < 1:
        raise UsageError(f"--nproc is {args.nproc}: it must be at least 1")
    worker = read_environment(os.environ, args.nproc)
    if worker.launcher == "none" and args.nproc > 1:
        return _launch(args)
    from ..failures import supervised

    with supervised(worker):
        return _work(args, worker)


def _launch(args: argparse.Namespace) -> int:
    """Check everything that can be checked, then start the ranks and wait for them."""
    config = load_config(args.config, args.overrides)

    from ..bootstrap import device_type
    from ..local_launch import launch_local

    device = device_type(config.run.device)
    plan = prepare_run(config, args.nproc, args.nproc, cache_folder(os.environ), args.fresh, device)

    command = ["-m", "counterflow", "train", args.config]
    for override in args.overrides:
        command += ["--set", override]
    command += [flag for flag, given in (("--fresh", args.fresh), ("--json", args.json)) if given]
    return launch_local(args.nproc, command, plan.run_dir / "logs")


def _work(args: argparse.Namespace, worker: WorkerEnvironment) -> int:
    """Run one rank, from its environment to the end of the run."""
    config = load_config(args.config, args.overrides)
    # Ranks that an elastic launcher starts again continue; only the first start is a fresh one.
    fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    import torch.distributed as dist

    from ..bootstrap import bootstrap, device_type
    from ..gpu_settings import refuse_launch_order
    from ..logs import open_log

    cache, device = cache_folder(os.environ), device_type(config.run.device)
    plan = prepare_run(config, worker.world_size, worker.local_world_size, cache, fresh, device)
    if device == "cuda":
        refuse_launch_order(os.environ, config.parallel.pp)
    run, dumps = config.run, plan.run_dir / "logs" / DUMPS
    with (
        bootstrap(
            worker, run.device, config.comm.backend, config.parallel.timeout, dumps, run.deterministic
        ) as process,
        locked(plan.run_dir) if process.rank == 0 else nullcontext(),
    ):
        check_same_run(plan, process)
        changes: list[str] = []
        if process.rank == 0:
            if fresh:
                move_aside(plan.run_dir)
            changes = write_config(plan.run_dir, config)
        dist.barrier()  # no rank may open a log in a folder that is still to be moved
        with open_log(plan.run_dir / "logs", process.rank, process.world_size):
            if process.settings:
                logger.info("%s", process.settings)
            if changes:
                logger.info("config changed since the last start of this run: %s", "; ".join(changes))
            return _train(plan, process, args.json)


def check_same_run(plan: RunPlan, process: Process) -> None:
    """Raise UsageError if ranks, perhaps on several machines, differ in text, checkpoint, length or BF16 products."""
    import torch.distributed as dist

    from ...fp8.products import Products

    basis = {
        "text": plan.data.digest[:12],
        "step to continue from": plan.progress.step,
        "last step": plan.total_steps,
    }
    if process.device.type == "cpu" and plan.config.precision.format == "bf16":  # ranks may run on different CPUs
        basis["products of BF16"] = str(Products.choose(plan.config.precision.cpu_products))
    by_rank: list[dict[str, Any]] = [{}] * process.world_size
    dist.all_gather_object(by_rank, basis)
    for rank, values in enumerate(by_rank):
        for name, value in values.items():
            if value != by_rank[0][name]:
                raise UsageError(
                    f"rank {rank} and rank 0 disagree on the {name}: {value} and {by_rank[0][name]}; "
                    "give every machine the same config and text, and a run.dir on a disk that all of them share; "
                    "where CPUs differ, set precision.cpu_products"
                )


def _train(plan: RunPlan, process: Process, as_json: bool) -> int:
    from ...report.progress import ProgressDisplay
    from ...training.build import make_groups
    from ...training.communicators import refuse_without_room
    from ...training.run import run_training, summarise
    from ..bootstrap import multiprocessors
    from ..memory_check import check_memory

    config = plan.config
    if plan.complete:
        heading = "already complete: raise train.steps to continue, or start again with --fresh"
    else:
        heading = "done"
        if process.device.type == "cuda" and config.comm.backend != "gloo":
            refuse_without_room(config, plan.layout, process.rank, multiprocessors(process.device))
        check_memory(plan, process)
        groups = make_groups(config, plan.layout, process.device.type)
        run_training(plan, groups, process.device)
    if process.rank == 0:
        summary = summarise(plan)
        ProgressDisplay(config.log, config.run.name, plan.total_steps).show_rows(heading, summary.rows())
        if as_json:
            print(summary.model_dump_json(), flush=True)
    return 0
