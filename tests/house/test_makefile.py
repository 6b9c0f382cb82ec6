"""Installations by `make`, seen by a stand-in for Python that writes down each call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAND_IN = """#!/bin/sh
echo "$@" >>calls
case "$*" in
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-c "*) exec {real} -c "import sys; sys.version_info = {version}; $2" ;;
esac
"""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path, root: Path) -> Make:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copyfile(root / name, tmp_path / name)

    def run(*arguments: str, version: tuple[int, int] = (3, 11), gpu: bool = False) -> subprocess.CompletedProcess[str]:
        python = write_script(tmp_path / "python", STAND_IN.format(real=sys.executable, version=(*version, 0)))
        write_script(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 1}\n")
        # MAKEFLAGS would pass on the options of the make that runs these tests.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        environ["PATH"] = f"{tmp_path / 'bin'}:{environ['PATH']}"
        command = ["make", "train", f"PYTHON={python}", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)

    return run


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def pip_calls(folder: Path) -> list[str]:
    calls = (folder / "calls").read_text().splitlines()
    return [call.split("pip install --quiet ")[1] for call in calls if "pip install" in call]


without_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")


@without_gpu
def test_without_a_gpu_the_pinned_torch_comes_first(make: Make, tmp_path: Path) -> None:
    assert make().returncode == 0
    assert pip_calls(tmp_path) == ["torch==2.13.0", "-e .[dev]"]


def test_with_a_gpu_torch_is_left_to_the_packages_range(make: Make, tmp_path: Path) -> None:
    assert make(gpu=True).returncode == 0
    assert pip_calls(tmp_path) == ["-e .[dev]"]


@pytest.mark.parametrize(
    ("gpu", "spec"), [pytest.param(False, "torch==2.13.0", marks=without_gpu), (True, "torch")], ids=["cpu", "gpu"]
)
def test_torch_comes_from_the_index_that_is_named(make: Make, tmp_path: Path, gpu: bool, spec: str) -> None:
    assert make("TORCH_INDEX=https://example.org/torch", gpu=gpu).returncode == 0
    assert pip_calls(tmp_path) == [f"--index-url https://example.org/torch {spec}", "-e .[dev]"]


def test_environment_is_made_once_and_again_when_its_definition_changes(make: Make, tmp_path: Path) -> None:
    for _ in range(2):
        assert make(gpu=True).returncode == 0
    assert len(pip_calls(tmp_path)) == 1
    newer = (tmp_path / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(tmp_path / "pyproject.toml", (newer, newer))
    assert make(gpu=True).returncode == 0
    assert len(pip_calls(tmp_path)) == 2


def test_the_documents_packages_come_with_the_first_make_docs(make: Make, tmp_path: Path) -> None:
    assert make(gpu=True).returncode == 0
    for _ in range(2):
        assert make("docs", gpu=True).returncode == 0
    assert pip_calls(tmp_path) == ["-e .[dev]", "-e .[docs]"]
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "-P -m mkdocs build"


def test_train_is_the_smoke_run_on_four_processes(make: Make, tmp_path: Path) -> None:
    assert make("ARGS=--set train.steps=3", gpu=True).returncode == 0
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last == "-P -m counterflow train smoke --nproc 4 --set train.steps=3"


def test_old_or_missing_python_is_named_with_the_remedy(make: Make, tmp_path: Path) -> None:
    old = make(version=(3, 9))
    assert old.returncode != 0
    assert "needs Python 3.11 or newer" in old.stderr
    assert "is 3.9" in old.stderr
    assert pip_calls(tmp_path) == []
    missing = make("PYTHON=no-such-python")
    assert missing.returncode != 0
    assert "There is no 'no-such-python' here" in missing.stderr
