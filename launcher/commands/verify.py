"""`counterflow verify CONFIG`: whether a layout trains as a single process does, tried on the configuration made small.

This process chooses the small run, starts its ranks on this machine and prints what rank 0 found. It writes nothing
but a temporary file.
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
from .options import add_config_arguments

if TYPE_CHECKING:
    from ...verify.check import Outcome


PIECE = 4096  # bytes that POSIX writes to a pipe all at once (PIPE_BUF on Linux)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Shrink the dimensions of a CONFIG, not its topology, run a few steps on processes of this machine and on a "
        "single one, on the CPU, and say how far losses, gradients, router biases and updated weights agree. Exit "
        "code 1 where they do not."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes at most (default: as few as show the topology, up to 8)"
    )
    parser.add_argument("--steps", type=int, default=2, metavar="K", help="steps of training (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # where rank 0 leaves what it found


def run(args: argparse.Namespace) -> int:
    """Verify; 0 where all agrees, 1 where it does not."""
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
        command += ["--nproc", str(ranks)] if args.nproc is None else ["--nproc", str(args.nproc)]
        for override in args.overrides:
            command += ["--set", override]
        code = launch_local(ranks, command)
        if code:
            return code
        outcomes: list[Outcome] = pickle.loads(result.read_bytes())
    if args.json:
        _print_long(json.dumps(to_json(config, shrunk, outcomes)))
    else:
        print(f"\n{body(outcomes, ranks)}")
    return 0 if all(outcome.agrees for outcome in outcomes) else 1


def _print_long(text: str) -> None:
    """Print ASCII in pieces that a pipe takes whole: with PYTHONUNBUFFERED set, Python drops what a write leaves."""
    for start in range(0, len(text), PIECE):
        sys.stdout.write(text[start : start + PIECE])
    print()


def _work(args: argparse.Namespace, worker: WorkerEnvironment) -> int:
    """One rank. What it found is no failure of a process, so it is left in a file, and the launcher gives the code."""
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
