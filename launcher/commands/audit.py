"""`counterflow audit CONFIG`: the error that FP8 brings to a configuration, and the tensors it comes from."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ...audit.case import AuditCase, make_case
from ...audit.result import Attribution, AuditStep, Result
from ...configs.config import Config
from ...configs.load import load_config
from ...configs.moved_keys import differences
from ...configs.sections import TrainConfig
from ...settings import UsageError
from ...training.run_folder import locked
from ..environment import WorkerEnvironment, cache_folder, read_environment, usable_cores
from ..output import print_long, write_page
from .options import add_config_arguments

if TYPE_CHECKING:
    from ...audit.run import Audit

CONFIG_FILE, RESULT_FILE = "config.json", "audit.json"
LINES = 20
"""Lines of the curve that are printed."""
FREE = ("log", "checkpoint")
"""Sections that do not change the result of an audit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Train a CONFIG twice, in its FP8 and in BF16, from the same weights on the same text, in lock step and in one "
        "process. Prints how far losses and gradients differ, the errors of quantisation in each class of tensors, and "
        "which class hurts. An audit that was stopped continues from its last checkpoint."
    )
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="steps of training (default: those of the CONFIG)")
    parser.add_argument("--every", type=int, metavar="K", help="steps between looks at gradients (default N / 10)")
    parser.add_argument(
        "--against", choices=("bf16", "fp32"), default="bf16", help="what FP8 is compared with (default bf16)"
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="PERCENT",
        help="exit code 1 if the mean losses of the last tenth of the steps differ by PERCENT or more",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curves and all tables")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the audit's records (default: run.dir/NAME-audit)"
    )


def run(args: argparse.Namespace) -> int:
    """Audit; 1 if a run did not stay finite, or the losses are further apart than --bound."""
    if read_environment(os.environ).launcher != "none":
        raise UsageError("audit trains in one process, whose maths is that of every layout: run it without torchrun")
    config = load_config(args.config, args.overrides)
    case = make_case(config, args.steps, args.every, args.against, args.out, cache_folder(os.environ))
    _check_folder(case)
    if args.html is not None and not args.html.absolute().parent.is_dir():
        raise UsageError(f"--html {args.html} cannot be written: there is no folder {args.html.absolute().parent}")
    with locked(case.folder):
        case.folder.mkdir(exist_ok=True)
        (case.folder / CONFIG_FILE).write_text(_dump(case.config))
        result = _audit(case, args.json)
        (case.folder / RESULT_FILE).write_text(json.dumps(result.model_dump()))
    if args.html is not None:
        from ...audit.page import draw

        write_page(args.html, draw(result))
    return _print_result(result, args)


def _print_result(result: Result, args: argparse.Namespace) -> int:
    from ...audit.report import report, signed

    if args.json:
        print_long(json.dumps(result.model_dump()))
    else:
        print(f"\n{report(result)}")
    if result.stopped is not None or result.loss is None:
        return 1
    error = abs(result.loss.error)
    if args.bound is None:
        return 0
    verdict = "within" if 100 * error < args.bound else "NOT within"
    out = sys.stderr if args.json else sys.stdout
    print(f"\nthe losses are {verdict} {args.bound:g} % of each other: {signed(result.loss.error)}", file=out)
    return 0 if 100 * error < args.bound else 1


def _audit(case: AuditCase, quiet: bool) -> Result:
    """Run both runs from their checkpoints to the last step, then find the classes that hurt."""
    from ...audit.report import heading, progress_heading, progress_line
    from ...audit.result import make_result, mean_loss
    from ...audit.run import audit_of
    from ..bootstrap import bootstrap

    config, out = case.config, sys.stderr if quiet else sys.stdout
    every = max(1, case.steps // LINES)

    def show_step(record: AuditStep) -> None:
        if record.step % every == 0 or record.step == case.steps:
            print(progress_line(record.step, mean_loss(audit.steps[-every:])), file=out, flush=True)

    print(heading(case), file=out, flush=True)
    with (
        bootstrap(WorkerEnvironment(), config.run.device, config.comm.backend, config.parallel.timeout) as process,
        audit_of(case, process.device, at_once=min(2, usable_cores())) as audit,
    ):
        resumed = audit.resume()
        earlier = _earlier_result(case) if resumed == case.steps else None
        if resumed:
            print(f"continues after step {resumed}", file=out)
        print(progress_heading(case.against), file=out, flush=True)
        stopped = audit.run(show_step)
        validation = None if stopped is not None else audit.validation()
        attribution = None
        if stopped is None and audit.looks:
            attribution = earlier.attribution if earlier is not None else _attribute(audit, out)
        return make_result(case, audit.steps, audit.looks, validation, attribution, stopped)


def _earlier_result(case: AuditCase) -> Result | None:
    """Result of an earlier audit of the same steps."""
    path = case.folder / RESULT_FILE
    if not path.exists():
        return None
    found = Result.model_validate(json.loads(path.read_text()))
    return found if found.steps == case.steps and found.attribution is not None else None


def _attribute(audit: Audit, out: TextIO) -> Attribution:
    from ...audit.attribution import attribute
    from ...audit.probe import Point

    look = audit.looks[-1]
    present = frozenset(look.classes) | frozenset(look.classes_for_weights)
    print("\nclasses of tensors in turn", end="", file=out, flush=True)

    def show_share(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            print(f" {done * 100 // total} %", end="", file=out, flush=True)

    found = attribute(audit, Point.of(audit.trainers["fp8"]), present, show_share)
    print(file=out, flush=True)
    return found


def _check_folder(case: AuditCase) -> None:
    """Raise UsageError if the folder holds the records of another audit."""
    folder, remedy = case.folder, "give another --out, or remove that folder"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file")
    other = {"bf16": "fp32", "fp32": "bf16"}[case.against]
    if (folder / other).exists():
        raise UsageError(f"{folder} holds an audit against {other}: {remedy}")
    path = folder / CONFIG_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds other files than an audit's: give another --out")
        return
    defaults = Config(train=TrainConfig(steps=1))
    changed = differences(json.loads(path.read_text()), *(json.loads(_dump(one)) for one in (case.config, defaults)))
    if changed:
        raise UsageError(f"{folder} holds an audit of another configuration ({', '.join(changed)}): {remedy}")


def _dump(config: Config) -> str:
    tree = config.model_dump(mode="json", exclude=set(FREE))
    del tree["train"]["steps"], tree["train"]["tokens"]  # a later start may raise the number of steps
    return json.dumps(tree)
