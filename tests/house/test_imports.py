"""The arrows between folders: who may import whom."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

# A folder may import itself, the modules at the root, and these folders.
MAY_IMPORT: dict[str, set[str]] = {
    "fp8": set(),
    "comm": {"fp8"},
    "model": {"fp8", "comm"},
    "parallel": {"fp8", "comm"},
    "data": set(),
    "checkpoint": {"model", "parallel"},
    "plan": {"parallel", "model"},
    "report": {"plan"},
    "configs": set(),
    "slurm": set(),
}
MAY_IMPORT["launcher"] = set(MAY_IMPORT)
AT_THE_ROOT = {"settings", "placement", "phases"}  # small contracts between folders
# Pure modules serve thousands of ranks on a laptop: no process group, no weight.
WITHOUT_TORCH = ("settings.py", "parallel/layout.py", "parallel/experts/placement.py", "parallel/schedule/", "plan/")


def imports_of(source: str, module: tuple[str, ...], is_package: bool, top_level_only: bool = False) -> Iterator[str]:
    """Absolute dotted names that `module`, given by its path below the root package, imports."""
    tree = ast.parse(source)
    package = ("counterflow", *(module if is_package else module[:-1]))
    for node in outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported; what only a type checker sees is left out."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def imports_of_file(root: Path, path: Path, top_level_only: bool = False) -> list[str]:
    is_package = path.name == "__init__.py"
    module = path.parts[:-1] if is_package else path.with_suffix("").parts
    return list(imports_of((root / path).read_text(encoding="utf-8"), module, is_package, top_level_only))


def wrong_arrows(folder: str, imported: list[str]) -> list[str]:
    allowed = MAY_IMPORT.get(folder, set()) | {folder} | AT_THE_ROOT
    inside = [name for name in imported if name.split(".")[0] == "counterflow"]
    return [name for name in inside if name.split(".")[1] not in {*allowed, "__version__"}]


def test_imports_run_only_down_the_arrows(root: Path, package_files: list[Path]) -> None:
    faults = [
        f"{path}: {name}"
        for path in package_files
        if path.name != "__main__.py"
        for name in wrong_arrows(path.parts[0] if len(path.parts) > 1 else "", imports_of_file(root, path))
    ]
    assert not faults, "\n".join(faults)


def test_the_check_sees_every_way_to_import_upwards() -> None:
    ways = [
        "from ..launcher import cli",
        "from ..launcher.cli import main",
        "from .. import launcher",
        "import counterflow.launcher.cli",
        "from counterflow import launcher",
        "def late():\n    from ..launcher import cli",
    ]
    for source in ways:
        assert wrong_arrows("data", list(imports_of(source, ("data", "reader"), is_package=False))), source
    assert not wrong_arrows("model", list(imports_of("from ..comm.flat import x", ("model", "moe"), is_package=False)))
    assert not wrong_arrows("data", list(imports_of("from .a import x\nimport json", ("data",), is_package=True)))


def test_every_folder_of_the_package_has_its_arrows(package_files: list[Path]) -> None:
    folders = {path.parts[0] for path in package_files if len(path.parts) > 1}
    assert folders <= set(MAY_IMPORT)


def test_arrows_make_no_circle() -> None:
    left = {folder: set(targets) for folder, targets in MAY_IMPORT.items()}
    while left:
        free = {folder for folder, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {folder: targets for folder, targets in left.items() if folder not in free}


@pytest.mark.parametrize(
    ("module", "needs"), [("settings", {"pydantic"}), ("placement", {"torch"}), ("__init__", set())]
)
def test_modules_at_the_root_need_little(root: Path, module: str, needs: set[str]) -> None:
    roots = {name.split(".")[0] for name in imports_of_file(root, Path(f"{module}.py"))}
    assert roots - sys.stdlib_module_names == needs


def test_every_module_at_the_root_is_known(package_files: list[Path]) -> None:
    at_root = {path.stem for path in package_files if len(path.parts) == 1}
    assert at_root <= AT_THE_ROOT | {"__init__", "__main__"}


def test_pure_modules_do_not_import_torch(root: Path, package_files: list[Path]) -> None:
    faults = [
        f"{path}: {name}"
        for path in package_files
        if path.as_posix().startswith(WITHOUT_TORCH) or path.name == "config.py"
        for name in imports_of_file(root, path)
        if name.split(".")[0] == "torch"
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("outside", [False, True], ids=["package", "tests"])
def test_what_is_imported_is_declared(
    root: Path, project_files: list[Path], package_files: list[Path], outside: bool
) -> None:
    """What is imported at the top must be installed by the package; tests may use the dev extra."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(project["optional-dependencies"]["dev"] if outside else [])]
    modules = {"pyyaml": ["yaml"], "pydantic": ["pydantic", "pydantic_core"]}
    installed = {requirement.split(";")[0].split(">")[0].split("=")[0].strip().lower() for requirement in declared}
    available = {module for name in installed for module in modules.get(name, [name])}
    available |= {"counterflow"} | sys.stdlib_module_names
    files = [p for p in project_files if p.suffix == ".py" and p not in package_files] if outside else package_files
    faults = [
        f"{path}: {name}"
        for path in files
        for name in imports_of_file(root, path, top_level_only=True)
        if name.split(".")[0] not in available
    ]
    assert not faults, "\n".join(faults)
