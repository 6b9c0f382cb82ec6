"""The real imports of the package, read from its source, for the rules of the house and the drawing of the floors."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

OUTSIDE_THE_PACKAGE = {"tests", "benchmarks", "docs", "examples"}

LOWER = ("kernels", "fp8", "data", "comm", "model", "parallel", "checkpoint")
MAY_IMPORT: dict[str, frozenset[str]] = {
    folder: frozenset(allowed.split())
    for folder, allowed in {
        "kernels": "",
        "fp8": "kernels",
        "data": "",
        "comm": "fp8 kernels",
        "model": "comm fp8 kernels",
        "parallel": "comm fp8 kernels",
        "checkpoint": "model parallel",
        "configs": " ".join(LOWER),
        "plan": "configs model parallel",
        "report": "plan configs model parallel",
        "training": f"report plan configs {' '.join(LOWER)}",
        "verify": f"training report plan configs {' '.join(LOWER)}",
        "audit": f"training report plan configs {' '.join(LOWER)}",
        "dryrun": f"training report plan configs {' '.join(LOWER)}",
        "slurm": "configs",
        "launcher": f"slurm dryrun audit verify training report plan configs {' '.join(LOWER)}",
    }.items()
}
"""Folders that each folder may import, in addition to itself and the contracts at the root."""

AT_THE_ROOT = frozenset(
    {"settings.py", "differentiable.py", "phases.py", "weight_gradients.py", "local_parameter.py", "seeds.py"}
)
"""Small contracts between folders, for all of them."""

PURE_PARTS = ("parallel/schedule/", "parallel/layout.py", "parallel/stages.py", "parallel/overlap_orders.py")
"""Parts of `parallel/` that are arithmetic alone. `configs/` may read these and the `config.py` of lower folders."""

WITHOUT_TORCH = (
    *("settings.py", "configs/", "plan/", "report/text/", "report/pages/", "parallel/experts/placement.py"),
    *("checkpoint/manifest.py", "checkpoint/expert_loads.py", "verify/grid.py", "verify/shrink.py"),
    *PURE_PARTS,
)
"""Files and folders that work for thousands of ranks on a laptop: importing them loads no torch."""


def tracked_files(root: Path) -> list[Path]:
    """Files that a commit of the working tree would hold, relative to `root`, in order."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in map(Path, filter(None, listed.split("\0"))) if (root / path).is_file())


def modules_of(files: Iterable[Path]) -> list[Path]:
    """The package's own modules among `files`."""
    return [path for path in files if path.suffix == ".py" and path.parts[0] not in OUTSIDE_THE_PACKAGE]


@cache
def parsed(file: Path) -> ast.Module:
    """Syntax tree of a Python file; each is read once per session."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(
    tree: ast.Module, module: tuple[str, ...], is_package: bool, top_level_only: bool = False
) -> Iterator[str]:
    """Absolute dotted names that `module`, given by its path below the root package, imports."""
    package = ("counterflow", *(module if is_package else module[:-1]))
    for node in outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported, without those for a type checker alone."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def imports_of_file(root: Path, path: Path, top_level_only: bool = False) -> list[str]:
    """Absolute dotted names that the file imports."""
    is_package = path.name == "__init__.py"
    module = path.parts[:-1] if is_package else path.with_suffix("").parts
    return list(imports_of(parsed(root / path), module, is_package, top_level_only))


Graph = Mapping[Path, frozenset[Path]]
"""For each file of the package the files of the package that it imports."""


def graph_of(root: Path, files: Iterable[Path]) -> Graph:
    """All imports among `files`: at the top, inside functions and for a type checker."""
    names = {_dotted(path): path for path in files}
    graph = {}
    for path in names.values():
        found = (_file_of(name, names) for name in imports_of_file(root, path))
        graph[path] = frozenset(target for target in found if target is not None and target != path)
    return graph


def _dotted(path: Path) -> str:
    parts = path.parts[:-1] if path.name == "__init__.py" else path.with_suffix("").parts
    return ".".join(("counterflow", *parts))


def _file_of(name: str, files: Mapping[str, Path]) -> Path | None:
    """The file that `import name` reads: the module itself, or the one that `name` is defined in."""
    return files.get(name) or files.get(name.rpartition(".")[0])


def circles(graph: Graph) -> list[list[Path]]:
    """Groups of files in which every file imports every other, directly or not."""
    below: dict[Path, set[Path]] = {}
    for path in graph:
        seen: set[Path] = set()
        waiting = list(graph[path])
        while waiting:
            found = waiting.pop()
            if found not in seen:
                seen.add(found)
                waiting.extend(graph[found])
        below[path] = seen
    groups = {
        frozenset(other for other in below[path] if path in below[other]) for path in graph if path in below[path]
    }
    return sorted(sorted(group) for group in groups)


def folder_of(path: Path) -> str:
    """The top folder of a file; the file's own name for a module at the root."""
    return path.parts[0]
