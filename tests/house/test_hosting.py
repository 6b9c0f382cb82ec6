"""Files that hosting sites and tools read: workflow, hooks, templates, citation."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def test_hosted_ci_runs_what_must_pass_and_nothing_else(root: Path) -> None:
    workflow = load(root / ".github" / "workflows" / "ci.yml")
    (job,) = workflow["jobs"].values()
    uses = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    assert uses == ["actions/checkout", "actions/setup-python"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"
    assert [shlex.split(command)[:2] for command in commands[:-1]] == [["make", ".venv/.installed"]]
    assert (root / ".ci" / "run").stat().st_mode & 0o111


def test_hosted_ci_has_the_oldest_python_that_is_supported(root: Path) -> None:
    workflow = load(root / ".github" / "workflows" / "ci.yml")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    (version,) = [
        step["with"]["python-version"] for job in workflow["jobs"].values() for step in job["steps"] if "with" in step
    ]
    assert project["requires-python"] == f">={version}"


def test_hooks_of_pre_commit_are_commands_of_make_that_need_no_network(root: Path) -> None:
    (repository,) = load(root / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["id"] for hook in repository["hooks"]} == {"lint", "house"}
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        command = shlex.split(hook["entry"])
        assert command[0] == "make"
        known = subprocess.run([command[0], "--dry-run", *command[1:]], cwd=root, capture_output=True, text=True)
        assert known.returncode == 0, known.stderr


@pytest.mark.parametrize("name", ["bug.md", "feature.md"])
def test_issue_templates_have_a_name_and_say_what_they_are_for(root: Path, name: str) -> None:
    text = (root / ".github" / "ISSUE_TEMPLATE" / name).read_text("utf-8")
    found = re.match(r"---\n(.*?)---\n\n(.+)", text, re.DOTALL)
    assert found is not None
    assert set(yaml.safe_load(found[1])) == {"name", "about", "labels"}


def test_citation_has_the_licence_of_the_project(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    citation = load(root / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == project["license"]
    assert citation["message"] and citation["title"] and citation["authors"]
