"""`counterflow dryrun`: a step of any rank of any layout, on shapes alone."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from ...configs.load import load_config
from ...report.text.dryrun import dry_run_text
from ...settings import UsageError
from .options import add_config_arguments

CONNECTIONS = 32
"""Queues of the hardware, as training sets CUDA_DEVICE_MAX_CONNECTIONS."""

ROUTINGS = ("drawn", "even", "skewed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Run one step of one rank as a GPU would, on tensors without values: what lives in its memory at the peak, "
        "which kernels run, when the host waits, and every message. Needs no GPU and no other ranks."
    )
    add_config_arguments(parser)
    add = parser.add_argument
    add("--world", type=_number, required=True, metavar="N", help="ranks of the run")
    add("--rank", type=_number, default=0, metavar="R", help="the rank that is run (default 0)")
    add("--microbatches", type=_number, metavar="M", help="micro-batches of the step (default: of the full batch)")
    add(
        "--routing",
        choices=ROUTINGS,
        default="drawn",
        help="where tokens go: by the router's selection on random scores (the default), evenly, or twice as many here",
    )
    add("--no-layer", action="store_true", help="leave out the counts of one MoE layer, which take seconds")
    add(
        "--rehearse",
        action="store_true",
        help="run the steps of all ranks by NCCL's rules instead, and tell whether they ever wait in a circle",
    )
    add("--json", type=Path, metavar="FILE", help="write everything to FILE as one JSON object; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Run dry and print."""
    from ...dryrun.rank import dry_run

    if not 0 <= args.rank < max(1, args.world):
        raise UsageError(f"--rank {args.rank}: {args.world} ranks are numbered 0 to {args.world - 1}")
    logging.getLogger().setLevel(logging.ERROR)
    if args.rehearse:
        return _rehearse(args)
    result = dry_run(
        load_config(args.config, args.overrides),
        args.world,
        args.rank,
        args.microbatches,
        args.routing,
        not args.no_layer,
    ).to_json()
    if args.json is not None and str(args.json) == "-":
        print(json.dumps(result))
        return 0
    if args.json is not None:
        args.json.write_text(json.dumps(result), encoding="utf-8")
    print(dry_run_text(result))
    return 0


def _rehearse(args: argparse.Namespace) -> int:
    """Print how a rehearsal of all ranks ends; returns 1 where it does not."""
    from ...dryrun.rehearsal import Rehearsal
    from ...dryrun.rules import Launch, Rules

    rehearsal = Rehearsal.of(load_config(args.config, args.overrides), args.world, args.microbatches)
    circle = rehearsal.run(Rules(connections=CONNECTIONS))
    launches = sum(isinstance(event, Launch) for program in rehearsal.programs.values() for event in program)
    if circle:
        print("ranks wait for each other for ever:", *circle, sep="\n  ")
        return 1
    print(f"no rank waits for ever: {args.world} ranks, two steps, {launches} kernels of NCCL")
    return 0


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expects a whole number, got {text!r}")
    return int(text)
