"""`counterflow simulate`: the cost of a pipeline schedule, before anything runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...configs.load import load_config
from ...configs.located_yaml import Fault, Location, parse_yaml
from ...parallel.schedule.catalogue import schedule_names
from ...parallel.schedule.choose import AUTO
from ...parallel.schedule.timeline import Timeline
from ...plan.simulation import Case, NumbersCase, case_from_config
from ...report.pages.timeline import draw_html
from ...report.text.simulation import assumptions, compare_table, report
from ...settings import UsageError
from ..output import write_page
from .options import add_config, add_overrides

INSTEAD = {
    "schedule": "--set parallel.schedule=NAME",
    "option": "--set parallel.schedule_options.KEY=VALUE",
    "ranks": "--set parallel.pp=P",
    "forward": "--set parallel.stage_costs=...",
    "backward_input": "--set parallel.stage_costs=...",
    "backward_weight": "--set parallel.stage_costs=...",
    "overlapped": "--pair-ratio R",
}
"""Arguments that take the place of a CONFIG, each with its equivalent for a CONFIG."""

P2P = "time of a transfer between ranks, in the unit of the costs; TFLOP with a CONFIG (default 0)"
COMPARE = (
    "all schedules in one table, for one model: costs are those of 1/P of its layers; a --schedule FILE.py:FUNCTION is "
    "added to it"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Simulate the pipeline of one training step: its time, each rank's bubble and live micro-batches. Give a "
        "CONFIG, for which the costs of its stages are predicted in TFLOP, or --ranks and --microbatches with costs "
        "in any one unit of time."
    )
    add_config(parser, optional=True)
    add = parser.add_argument_group("with a CONFIG").add_argument
    add_overrides(add)
    add(
        "--pair-ratio",
        type=_cost,
        metavar="R",
        help="time of an overlapped pair over that of its parts (default 2.5/3)",
    )
    add("--measure", action="store_true", help="time the model's parts here; prints parallel.stage_costs to paste")
    add = parser.add_argument_group("without").add_argument
    add("--schedule", metavar="NAME", help=f"{', '.join(schedule_names())}, FILE.py:FUNCTION, or auto (the default)")
    add("--option", action="append", metavar="KEY=VALUE", help="an option of the schedule, such as stages_per_rank=4")
    add("--ranks", type=_count, metavar="P", help="pipeline ranks")
    add("--forward", type=_cost, metavar="F", help="cost of a stage's forward (default 1)")
    add("--backward-input", type=_cost, metavar="I", help="cost of its backward for the input (default 1)")
    add("--backward-weight", type=_cost, metavar="W", help="cost of its backward for the weights (default 1)")
    add("--overlapped", type=_cost, metavar="FB", help="cost of an overlapped pair (default 2.5/3 of F + I + W)")
    add = parser.add_argument_group("in both cases").add_argument
    add("--microbatches", type=_count, metavar="M", help="micro-batches of a step (default: those of the CONFIG)")
    add("--p2p", type=_cost, default=0.0, metavar="T", help=P2P)
    add("--compare", action="store_true", help=COMPARE)
    add("--html", type=Path, metavar="FILE", help="write a page with the timelines drawn to scale")
    add("--json", action="store_true", help="print one JSON object; with --compare, one for each schedule")


def run(args: argparse.Namespace) -> int:
    """Simulate and print, or measure."""
    _refuse_mixtures(args)
    if args.measure:
        from ...training.measure import measure_parts
        from ..bootstrap import choose_device

        config = load_config(args.config, args.overrides)
        device, _ = choose_device(config.run.device, "auto", local_rank=0, local_world_size=1)
        print(measure_parts(config, device), end="")
        return 0
    case: Case
    if args.config is None:
        case = _case_from_numbers(args)
    else:
        case = case_from_config(load_config(args.config, args.overrides), args.microbatches, args.pair_ratio, args.p2p)
    if args.compare:
        return _compare(case, args)
    timeline = case.simulate()
    if args.html is not None:
        write_page(args.html, draw_html([(timeline.schedule.name, timeline)], case.unit, _notes(case)))
    print(json.dumps(case.to_json(timeline)) if args.json else report(case, timeline))
    return 0


def _compare(case: Case, args: argparse.Namespace) -> int:
    """Compare every shipped schedule, and the user's own if it is not a shipped one."""
    outcomes = case.compare()
    drawn = [(name, timeline) for name, timeline in outcomes.items() if isinstance(timeline, Timeline)]
    if args.html is not None:
        write_page(args.html, draw_html(drawn, case.unit, _notes(case)))
    if args.json:
        results = {
            name: case.to_json(outcome) if isinstance(outcome, Timeline) else {"refused": outcome}
            for name, outcome in outcomes.items()
        }
        print(json.dumps(results))
    else:
        print(compare_table(case, outcomes))
    return 0


def _case_from_numbers(args: argparse.Namespace) -> NumbersCase:
    """The case that the arguments alone describe."""
    given = (args.forward, args.backward_input, args.backward_weight)
    forward, backward_input, backward_weight = (1.0 if cost is None else cost for cost in given)
    return NumbersCase(
        num_ranks=args.ranks,
        num_microbatches=args.microbatches,
        schedule=AUTO if args.schedule is None else args.schedule,
        options=_options(args.option or ()),
        forward=forward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        overlapped=args.overlapped,
        p2p=args.p2p,
    )


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Schedule options from `--option KEY=VALUE`, each value a YAML scalar."""
    options: dict[str, Any] = {}
    for option in given:
        name, equals, text = option.partition("=")
        faults: list[Fault] = []
        value = parse_yaml(text, Location(f"--option {option}", level=-1), faults)
        if not equals or not name or faults or value is None or isinstance(value.value, list | dict | None):
            raise UsageError(f"--option {option}: expects KEY=VALUE, such as stages_per_rank=4")
        options[name] = value.value
    return options


def _refuse_mixtures(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, all at once."""
    faults = []
    if args.config is not None:
        given = [name for name in INSTEAD if getattr(args, name) is not None]
        faults += [f"{_flag(name)} does not go with a CONFIG: use {INSTEAD[name]}" for name in given]
    else:
        needs = {"--set": args.overrides, "--pair-ratio": args.pair_ratio is not None, "--measure": args.measure}
        faults += [f"{flag} needs a CONFIG" for flag, given in needs.items() if given]
        missing = [_flag(name) for name in ("ranks", "microbatches") if getattr(args, name) is None]
        if missing:
            faults.append(f"give a CONFIG, or numbers, of which {' and '.join(missing)} cannot be left out")
        if args.compare and not _is_own(args.schedule):
            given = [name for name in ("schedule", "option") if getattr(args, name) is not None]
            reason = "which takes every schedule: only a --schedule FILE.py:FUNCTION, and its options, can be added"
            faults += [f"{_flag(name)} does not go with --compare, {reason}" for name in given]
    if args.measure:
        others = {
            "--microbatches": args.microbatches is not None,
            "--pair-ratio": args.pair_ratio is not None,
            "--p2p": args.p2p,
            "--compare": args.compare,
            "--html": args.html is not None,
            "--json": args.json,
        }
        faults += [f"{flag} does not go with --measure, which simulates nothing" for flag, on in others.items() if on]
    if faults:
        raise UsageError("\n  ".join(faults))


def _is_own(schedule: str | None) -> bool:
    """Whether a schedule is a function in the user's own file."""
    return schedule is not None and schedule.rpartition(":")[0].endswith(".py")


def _notes(case: Case) -> list[str]:
    """Sentences on the origin of a page's numbers."""
    first, *more = assumptions(case)
    return [f"Costs: {first}", *more]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expects a whole number of at least 1, got {text!r}")
    return int(text)


def _cost(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expects a number of at least 0, got {text!r}")
    return value
