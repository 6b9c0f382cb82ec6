"""`counterflow config CONFIG`: a configuration with everything resolved."""

from __future__ import annotations

import argparse
import json
import re
import sys

from ...configs.load import load_config
from ...configs.write import explain, plain, to_yaml
from .options import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--explain", action="store_true", help="with each key's meaning, unit and default")
    form.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the configuration: YAML that loads again, or JSON."""
    config = load_config(args.config, args.overrides)
    if args.json:
        print(json.dumps(plain(config), indent=2))
        return 0
    text = explain(config) if args.explain else to_yaml(config)
    if sys.stdout.isatty():
        _print_coloured(text)
    else:
        print(text, end="")
    return 0


def _print_coloured(text: str) -> None:
    """Print sections bold, keys coloured, comments dim; without wrapping, so that copied text is still YAML."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in text.splitlines():
        styled = Text(line)
        comment = re.search(r"(^|\s\s)\s*#.*$", line)
        key = re.match(r"\s*\w+:", line)
        if key:
            styled.stylize("bold cyan" if not line.startswith(" ") else "cyan", key.start(), key.end())
        if comment:
            styled.stylize("dim", comment.start(), comment.end())
        console.print(styled)
