"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and --set, for a command that reads a configuration."""
    add_config(parser)
    add_overrides(parser.add_argument)


def add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add CONFIG; `args.config` is None where an optional one is left out."""
    help = "path of a YAML file, or the name of a shipped config"
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help=help)


def add_overrides(add_argument: Callable[..., object]) -> None:
    """Add --set, as the list `args.overrides`, by the method of a parser or of a group of its arguments."""
    add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key, such as optim.lr=1e-4 or parallel.dp=auto; the value is YAML; may be repeated",
    )
