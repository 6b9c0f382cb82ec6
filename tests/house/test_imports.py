"""The floors of the house: who may import whom, and what a laptop can import without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterflow.tests.house.imports import (
    AT_THE_ROOT,
    MAY_IMPORT,
    PURE_PARTS,
    WITHOUT_TORCH,
    Graph,
    circles,
    folder_of,
    graph_of,
    imports_of,
    imports_of_file,
    parsed,
)


@pytest.fixture(scope="session")
def graph(root: Path, package_files: list[Path]) -> Graph:
    """The package's real imports, type-only and late ones included."""
    return graph_of(root, package_files)


def wrong_arrows(path: Path, imported: list[str]) -> list[str]:
    """Names of the package among `imported` that the file at `path` may not import."""
    folder = folder_of(path)
    allowed = MAY_IMPORT.get(folder, frozenset()) | {folder} | {name.removesuffix(".py") for name in AT_THE_ROOT}
    inside = [name for name in imported if name.split(".")[0] == "counterflow"]
    return [name for name in inside if name.split(".")[1] not in {*allowed, "__version__"}]


def test_imports_run_only_down_the_arrows(root: Path, package_files: list[Path]) -> None:
    files = [path for path in package_files if path.name != "__main__.py"]
    faults = [f"{path}: {name}" for path in files for name in wrong_arrows(path, imports_of_file(root, path))]
    assert not faults, "\n".join(faults)


def test_the_check_sees_every_way_to_import_upwards() -> None:
    ways = [
        "from ..launcher import cli",
        "from ..launcher.cli import main",
        "from .. import launcher",
        "import counterflow.launcher.cli",
        "from counterflow import launcher",
        "def late():\n    from ..launcher import cli",
        "if TYPE_CHECKING:\n    from ..launcher import cli",
    ]
    for source in ways:
        imported = list(imports_of(ast.parse(source), ("data", "reader"), is_package=False))
        assert wrong_arrows(Path("data/reader.py"), imported), source
    down = list(imports_of(ast.parse("from ..comm.flat import x"), ("model", "moe"), is_package=False))
    assert not wrong_arrows(Path("model/moe.py"), down)
    own = list(imports_of(ast.parse("from .a import x\nimport json"), ("data",), is_package=True))
    assert not wrong_arrows(Path("data/__init__.py"), own)


def test_configurations_read_only_the_pure_parts_of_lower_folders(graph: Graph) -> None:
    faults = [
        f"{path}: {target}"
        for path, targets in graph.items()
        if folder_of(path) == "configs"
        for target in targets
        if folder_of(target) not in {"configs", *AT_THE_ROOT, "__init__.py"}
        and target.name != "config.py"
        and not target.as_posix().startswith(PURE_PARTS)
    ]
    assert not faults, "\n".join(faults)


def test_every_folder_of_the_package_has_its_arrows(package_files: list[Path]) -> None:
    assert {folder_of(path) for path in package_files if len(path.parts) > 1} <= set(MAY_IMPORT)


def test_arrows_make_no_circle() -> None:
    left = {folder: set(targets) for folder, targets in MAY_IMPORT.items()}
    while left:
        free = {folder for folder, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {folder: targets for folder, targets in left.items() if folder not in free}


def test_files_make_no_circle(graph: Graph) -> None:
    assert circles(graph) == []


def test_the_check_finds_a_circle() -> None:
    a, b, c, d = map(Path, "abcd")
    assert circles({a: frozenset({b}), b: frozenset({c}), c: frozenset({b, d}), d: frozenset()}) == [[b, c]]


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("settings", {"pydantic"}),
        ("seeds", {"numpy"}),
        ("local_parameter", {"torch"}),
        ("weight_gradients", {"torch"}),
        ("differentiable", {"torch"}),
        ("phases", {"torch", "counterflow"}),
        ("__init__", set()),
    ],
)
def test_modules_at_the_root_need_little(root: Path, module: str, needs: set[str]) -> None:
    roots = {name.split(".")[0] for name in imports_of_file(root, Path(f"{module}.py"))}
    assert roots - sys.stdlib_module_names == needs


def test_every_module_at_the_root_is_a_known_contract(package_files: list[Path]) -> None:
    at_root = {path.name for path in package_files if len(path.parts) == 1}
    assert at_root == AT_THE_ROOT | {"__init__.py", "__main__.py"}


def test_what_a_laptop_plans_with_is_free_of_torch(package_files: list[Path]) -> None:
    """Imports every such module in one process in which importing torch is an error."""
    pure = [path for path in package_files if path.as_posix().startswith(WITHOUT_TORCH) or path.name == "config.py"]
    assert len(pure) > 50
    names = [".".join(("counterflow", *path.with_suffix("").parts)).removesuffix(".__init__") for path in pure]
    code = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        f"for name in {names}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: print(name, error)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def private_names(tree: ast.Module) -> set[str]:
    """Names with one leading underscore that the file defines: functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


def foreign_privates(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Uses of a name with a leading underscore that another file of ours defines, and the using file does not."""
    defined = {path: private_names(tree) for path, tree in trees.items()}
    everywhere = set().union(*defined.values())
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if node.level]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            else:
                continue
            yield from (f"{path}: {name}" for name in names if name in everywhere - defined[path])


def test_no_file_uses_what_is_private_to_another(root: Path, package_files: list[Path]) -> None:
    trees = {path: parsed(root / path) for path in package_files}
    assert sorted(foreign_privates(trees)) == []


def test_the_check_sees_imports_and_attributes_of_others() -> None:
    owner = ast.parse("def _hidden(): ...\nclass A:\n    def __init__(self): self._state = 1")
    user = ast.parse(
        "from .owner import _hidden\nfrom . import owner\nowner._hidden\na._state\nself._mine = 1\na._mine"
    )
    found = list(foreign_privates({Path("owner.py"): owner, Path("user.py"): user}))
    assert sorted(found) == ["user.py: _hidden", "user.py: _hidden", "user.py: _state"]


@pytest.mark.parametrize("outside", [False, True], ids=["package", "tests"])
def test_what_is_imported_is_declared(
    root: Path, project_files: list[Path], package_files: list[Path], outside: bool
) -> None:
    """Modules imported at the top must be installed by the package; tests may use the dev extra."""
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
