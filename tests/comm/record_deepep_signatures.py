"""Record the parameters and results of DeepEP's callables, from the source in a clone of its repository.

    git clone https://github.com/deepseek-ai/DeepEP && python tests/comm/record_deepep_signatures.py DeepEP

writes deepep_signatures.json next to this file: names and defaults of parameters, numbers of returned values, and the
group sizes with a configuration. DeepEP is not imported: its compiled parts need a GPU's libraries.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("deepep_signatures.json")

RELEASES = {
    "1.2.1": ("9af0e0d0e74f3577af1979c9b9e1ac2cad0104ee", "deep_ep/buffer.py", None, "deep_ep/utils.py"),
    "2.1.0": (
        "dd758caf451848bd150e1046af3d0a73e5fff38d",
        "deep_ep/buffers/legacy.py",
        "deep_ep/buffers/elastic.py",
        "deep_ep/utils/event.py",
    ),
}
"""Commit of each release, and the files of `Buffer`, `ElasticBuffer` and `EventOverlap`. Version 1 ends with the tag
v1.2.1; version 2 had no tag when it was read."""

LEGACY = (
    "__init__",
    "set_num_sms",
    "get_dispatch_config",
    "get_combine_config",
    "get_dispatch_layout",
    "dispatch",
    "combine",
    "destroy",
)
ELASTIC = ("__init__", "dispatch", "combine", "destroy")


def read(clone: Path) -> dict[str, Any]:
    """Record of the releases in `clone`, a folder with their history."""
    return {release: _read(clone, *source) for release, source in RELEASES.items()}


def _read(clone: Path, commit: str, legacy: str, elastic: str | None, event: str) -> dict[str, Any]:
    wanted = [(legacy, f"Buffer.{name}") for name in LEGACY]
    wanted += [(elastic, f"ElasticBuffer.{name}") for name in ELASTIC] if elastic else []
    wanted.append((event, "EventOverlap.current_stream_wait"))
    sources = {path: _source(clone, commit, path) for path, _ in wanted}
    callables, returns = {}, {}
    for path, name in wanted:
        found = _find(sources[path], name)
        callables[name], returns[name] = _signature(found), _returned(found)
    buffers = _find(sources[legacy], "Buffer.get_dispatch_config"), _find(sources[legacy], "Buffer.get_combine_config")
    groups = [_keys(definition) for definition in buffers]
    assert groups[0] == groups[1], groups
    return {"commit": commit, "callables": callables, "returns": returns, "groups": groups[0]}


def _source(clone: Path, commit: str, path: str) -> ast.Module:
    command = ["git", "-C", str(clone), "show", f"{commit}:{path}"]
    return ast.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _find(source: ast.Module, name: str) -> ast.FunctionDef:
    node: Any = source
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    assert isinstance(node, ast.FunctionDef)
    return node


def _signature(function: ast.FunctionDef) -> str:
    """Source text of the parameters, without annotations and without self."""
    arguments = function.args
    if arguments.args and arguments.args[0].arg == "self":
        arguments.args.pop(0)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _returned(function: ast.FunctionDef) -> int:
    """Number of values in the annotation of the result."""
    given = function.returns
    if not isinstance(given, ast.Subscript) or ast.unparse(given.value) != "Tuple":
        return 0 if given is None or ast.unparse(given) == "None" else 1
    assert isinstance(given.slice, ast.Tuple)
    return len(given.slice.elts)


def _keys(function: ast.FunctionDef) -> list[int]:
    """Keys of the table in which a function looks up its argument."""
    (table,) = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
    return [ast.literal_eval(key) for key in table.keys if key is not None]


if __name__ == "__main__":
    RECORD.write_text(json.dumps(read(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    print(RECORD)
