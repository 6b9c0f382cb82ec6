"""What a user gets who installs the package instead of cloning it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


def build(kind: str, source: Path, target: Path) -> Path:
    """Build an sdist or a wheel of `source` with the installed setuptools and return the file."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def installed(root: Path, project_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as `pip install` of its sdist lays it out."""
    place = tmp_path_factory.mktemp("packaging")
    for path in project_files:
        (place / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, place / "clone" / path)
    with tarfile.open(build("sdist", place / "clone", place / "dist")) as sdist:
        sdist.extractall(place / "sdist", filter="data")
    (unpacked,) = (place / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, place / "dist")) as wheel:
        wheel.extractall(place / "site")
    return place / "site"


def test_every_module_is_installed_and_nothing_else(installed: Path, package_files: list[Path]) -> None:
    modules = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    assert modules == {f"counterflow/{path.as_posix()}" for path in package_files}


def test_style_sheets_and_scripts_of_pages_are_installed(
    installed: Path, root: Path, project_files: list[Path], package_files: list[Path]
) -> None:
    folders = {path.parent for path in package_files}
    assets = [path for path in project_files if path.suffix in (".css", ".js") and path.parent in folders]
    assert {path.suffix for path in assets} == {".css", ".js"}
    for path in assets:
        assert (installed / "counterflow" / path).read_bytes() == (root / path).read_bytes()


def test_shipped_configs_and_licence_are_installed(installed: Path, root: Path, project_files: list[Path]) -> None:
    shipped = [path for path in project_files if path.parts[0] in ("configs", "slurm") and path.suffix != ".py"]
    assert shipped
    for path in shipped:
        assert (installed / "counterflow" / path).read_bytes() == (root / path).read_bytes()
    (licence,) = installed.glob("counterflow-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (root / "LICENSE").read_bytes()


def test_type_checkers_find_the_packages_own_annotations(installed: Path) -> None:
    assert (installed / "counterflow" / "py.typed").is_file()


def test_installed_package_works_without_the_clone(installed: Path, tmp_path: Path) -> None:
    # -S leaves out site-packages' .pth files, so the editable install cannot answer in the wheel's place.
    code = (
        f"import sys; sys.path = [{str(installed)!r}, *{sys.path!r}]\n"
        "import counterflow, counterflow.configs.config, counterflow.report.pages.page\n"
        "assert '<h1>title</h1>' in counterflow.report.pages.page.draw_page('title', '')\n"
        "print(counterflow.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "counterflow" / "__init__.py"
