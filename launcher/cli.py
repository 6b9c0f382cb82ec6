"""The `counterflow` command: one module of `commands/` per sub-command, loaded when the command is called.

A sub-command's module offers `add_arguments(parser)` and `run(args) -> int`, the exit code: 0 done, 1 failed, 2 bad
usage or config. Nothing here imports torch, so that help and configuration are printed at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from .. import __version__
from ..settings import UsageError


@dataclass(frozen=True)
class Command:
    """A sub-command: its name, the same as its module's in `commands/`, and one line of help."""

    name: str
    help: str


COMMANDS = (
    Command("train", "train a model"),
    Command("config", "print a configuration, resolved and explained"),
    Command("simulate", "simulate a pipeline schedule: step time, bubbles, memory"),
    Command("dryrun", "run a rank's step on shapes alone: memory, kernels, traffic"),
    Command("audit", "audit FP8: train in FP8 and in BF16 and compare losses, gradients and tensors"),
    Command("report", "report what a run measured: losses, speed, balance, traffic"),
    Command("placement", "place experts for inference by the loads that a run measured"),
    Command("verify", "verify that a layout trains as a single process does"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, without the program's name, and return the exit code. Default: the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(_fit(f"counterflow: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("counterflow: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended; return what a shell would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _fit(message: str) -> str:
    """Break the lines of a message at words for a person's terminal; leave them whole for files and other programs."""
    if not sys.stderr.isatty():
        return message
    width = shutil.get_terminal_size().columns
    lines = []
    for line in message.splitlines():
        below = " " * (len(line) - len(line.lstrip()) + 2)
        broken = textwrap.wrap(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
        lines += broken or [""]
    return "\n".join(lines)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="counterflow",
        description="Pretrain DeepSeek-V3-class models.",
        epilog="`counterflow COMMAND --help` explains a command. To begin: counterflow train tiny",
    )
    parser.add_argument("--version", action="version", version=f"counterflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parsers = {
        command.name: commands.add_parser(command.name, help=command.help, description=f"{command.help.capitalize()}.")
        for command in COMMANDS
    }
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    module = None
    try:
        name = arguments[0]
        if not name.startswith("-"):
            module = import_module(f".commands.{_command(name, parser).name}", __package__)
            module.add_arguments(parsers[name])
        args = parser.parse_args(arguments)
        if module is None:
            parser.error("the first argument is a command")
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 0
    return int(module.run(args))


def _command(name: str, parser: argparse.ArgumentParser) -> Command:
    commands = {command.name: command for command in COMMANDS}
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        parser.error(f"there is no command {name!r}{meant}; commands: {', '.join(commands)}")
    return commands[name]
