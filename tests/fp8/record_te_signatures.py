"""Record the signatures of Transformer Engine's callables, read from the source in the published wheels.

    python tests/fp8/record_te_signatures.py

writes te_signatures.json next to this file, for two releases: the oldest one that Counterflow accepts, and the one that
it was written for. No part of them is imported: their compiled parts need a GPU's libraries. Signatures are kept as
source text.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RELEASES = ("2.9.0", "2.20.2")
RECORD = Path(__file__).with_name("te_signatures.json")

PYTORCH = "transformer_engine/pytorch"
RECIPE = "transformer_engine/common/recipe/__init__.py"
CALLABLES = {
    "autocast": "quantization.py",
    "is_fp8_block_scaling_available": "quantization.py",
    "is_mxfp8_available": "quantization.py",
    "Linear.__init__": "module/linear.py",
    "Linear.forward": "module/linear.py",
    "GroupedLinear.__init__": "module/grouped_linear.py",
    "GroupedLinear.forward": "module/grouped_linear.py",
    "GroupedLinear.backward_dw": "module/grouped_linear.py",
    "TransformerEngineBaseModule.backward_dw": "module/base.py",
    "DotProductAttention.__init__": "attention/dot_product_attention/dot_product_attention.py",
    "DotProductAttention.forward": "attention/dot_product_attention/dot_product_attention.py",
    "FusedAdam.__init__": "optimizers/fused_adam.py",
    "FusedAdam.initialize_state": "optimizers/fused_adam.py",
    "FusedAdam.step": "optimizers/fused_adam.py",
    "Float8BlockQuantizer": "tensor/float8_blockwise_tensor.py",
}
EXPORTS = {name.split(".")[0] for name in CALLABLES} | {"optimizers"}
RECIPES = ("Float8BlockScaling", "MXFP8BlockScaling", "QParams")
ATTRIBUTES = {
    "Linear": ("module/linear.py", "module/base.py"),
    "GroupedLinear": ("module/grouped_linear.py", "module/base.py"),
}
"""Modules, and the files whose classes give them their attributes."""
USED = {"save_original_input", "_fp8_workspaces", "use_grouped_tensor"}
"""Attributes that the package reads or sets."""


def download(release: str, folder: Path) -> Path:
    """The wheel of a release, unpacked under `folder`; raises CalledProcessError where pip cannot get it."""
    place = folder / f"transformer_engine-{release}"
    if not place.exists():
        with tempfile.TemporaryDirectory() as fetched:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--dest", fetched, f"transformer-engine=={release}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            (wheel,) = Path(fetched).glob("*.whl")
            partial = place.with_suffix(".partial")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            partial.rename(place)
    return place


def read(source: Path) -> dict[str, Any]:
    """The record of the package in `source`."""
    return {
        "exports": sorted(set(_exports(source / PYTORCH / "__init__.py")) & EXPORTS),
        "callables": {name: _signature(source / PYTORCH / path, name) for name, path in CALLABLES.items()},
        "recipes": {name: _fields(source / RECIPE, name) for name in RECIPES},
        "formats": sorted(_assigned(_find(source / RECIPE, "Format"))),
        "attributes": {
            name: sorted(USED & {found for path in paths for found in _attributes(source / PYTORCH / path)})
            for name, paths in ATTRIBUTES.items()
        },
    }


def parse(signature: str) -> inspect.Signature:
    """A signature from its source text; defaults stay text."""
    (function,) = ast.parse(f"def f{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments, kinds = function.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    found = []
    for argument, default in zip(plain, defaults, strict=True):
        kind = kinds.POSITIONAL_ONLY if argument in arguments.posonlyargs else kinds.POSITIONAL_OR_KEYWORD
        found.append(kinds(argument.arg, kind, default=_text(default)))
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=_text(default)))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def _text(default: ast.expr | None) -> Any:
    return inspect.Parameter.empty if default is None else ast.unparse(default)


def _find(path: Path, name: str) -> Any:
    """The definition of a dotted name. The last definition counts, as in Python."""
    node: Any = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = [child for child in node.body if getattr(child, "name", None) == part][-1]
    return node


def _signature(path: Path, name: str) -> str:
    found = _find(path, name)
    arguments = _find(path, f"{name}.__init__").args if isinstance(found, ast.ClassDef) else found.args
    if isinstance(found, ast.ClassDef):
        arguments.args.pop(0)  # self
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _fields(path: Path, name: str) -> dict[str, list[str]]:
    """Fields of a dataclass, which are keywords, and other names that it assigns, which are not."""
    body = _find(path, name).body
    fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {"fields": fields, "others": sorted(_assigned(_find(path, name)))}


def _assigned(definition: Any) -> Iterator[str]:
    for node in definition.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _attributes(path: Path) -> Iterator[str]:
    """Attributes of self that any method of the file sets."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                yield target.attr


def _exports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = {release: read(download(release, Path(folder))) for release in RELEASES}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(RECORD)


if __name__ == "__main__":
    main()
