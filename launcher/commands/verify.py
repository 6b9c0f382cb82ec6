"""`counterflow verify CONFIG`: whether a layout trains as a single process does, tried on a shrunk configuration.

This process shrinks the configuration, starts the ranks on this machine and prints the outcomes that rank 0 found. The
only file that it writes is a temporary one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...configs.config import Config
from ...configs.load import load_config
from ...settings import UsageError
from ...verify.shrink import Shrunk, shrink
from ..environment import WorkerEnvironment, read_environment
from ..output import print_long
from .options import add_config_arguments

if TYPE_CHECKING:
    from ...verify.check import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Shrink the dimensions of a CONFIG, not its topology. Run a few steps on processes of this machine and on a "
        "single one, on the CPU. Print how far losses, gradients, router biases and updated weights agree. Exit code 1 "
        "if they do not."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes at most (default: as few as show the topology, up to 8)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="K", help="steps of training (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # file for the outcomes that rank 0 found


def run(args: argparse.Namespace) -> int:
    """Verify; 0 if all agrees, 1 if not."""
    worker = read_environment(os.environ, args.nproc or 1)
    if worker.launcher == "torchrun":
        raise UsageError("verify starts its own processes on this machine: run it without torchrun, with --nproc N")
    if worker.launcher == "none":
        config = load_config(args.config, args.overrides)
        return _launch(args, config, shrink(config, args.nproc, args.steps))
    from ..failures import supervised

    with supervised(worker):
        return _work(args, worker)


def _launch(args: argparse.Namespace, config: Config, shrunk: Shrunk) -> int:
    """Start the ranks of the small run, wait for them, and print."""
    from ...verify.report import body, heading, to_json
    from ..local_launch import launch_local

    if not args.json:
        print(heading(config, shrunk), flush=True)
    ranks = shrunk.layout.world_size
    with tempfile.TemporaryDirectory(prefix="counterflow-verify-") as folder:
        result = Path(folder, "result")
        command = ["-m", "counterflow", "verify", args.config, "--steps", str(args.steps), "--result", str(result)]
        command += ["--nproc", str(ranks if args.nproc is None else args.nproc)]
        for override in args.overrides:
            command += ["--set", override]
        code = launch_local(ranks, command)
        if code:
            return code
        outcomes: list[Outcome] = pickle.loads(result.read_bytes())
    if args.json:
        print_long(json.dumps(to_json(config, shrunk, outcomes)))
    else:
        print(f"\n{body(outcomes, ranks)}")
    return 0 if all(outcome.agrees for outcome in outcomes) else 1


def _work(args: argparse.Namespace, worker: WorkerEnvironment) -> int:
    """Run one rank. Outcomes go to a file, bad ones included: a difference is not a failure of a process."""
    from ...training.build import make_groups
    from ...verify.check import verify_ranks
    from ..bootstrap import bootstrap

    shrunk = shrink(load_config(args.config, args.overrides), args.nproc, args.steps)
    assert shrunk.layout.world_size == worker.world_size, (shrunk.layout, worker)
    with bootstrap(worker, "cpu", "gloo", shrunk.config.parallel.timeout) as process:
        groups = make_groups(shrunk.config, shrunk.layout, process.device.type)
        outcomes = verify_ranks(shrunk, groups)
    if worker.rank == 0:
        args.result.write_bytes(pickle.dumps(outcomes))
    sys.stdout.flush()
    return 0
