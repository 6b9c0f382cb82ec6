"""The site of `make docs`: its navigation, its API pages and its links, without building it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterflow.docs.site_pages import (
    ROOT_PAGES,
    api_navigation,
    api_page,
    api_text,
    modules,
    packages,
    site_target,
    turned,
)


@pytest.fixture(scope="module")
def settings(root: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((root / "mkdocs.yml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def pages_of(navigation: list[Any]) -> Iterator[str]:
    """Every page of a navigation, however deep."""
    for entry in navigation:
        if isinstance(entry, str):
            yield entry
            continue
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_navigation_names_every_document_once(settings: dict[str, Any], project_files: list[Path]) -> None:
    named = list(pages_of(settings["nav"]))
    documents = [
        path.name
        for path in project_files
        if path.parts[0] == "docs" and "proofs" not in path.parts and path.suffix == ".md"
    ]
    assert sorted(named) == sorted([*documents, *ROOT_PAGES.values()])


def test_documents_of_the_root_exist(root: Path) -> None:
    assert [source for source in ROOT_PAGES if not (root / source).is_file()] == []


def test_every_public_module_has_its_api_page(root: Path, package_files: list[Path]) -> None:
    public = {path.as_posix() for path in package_files if path.stem == "__init__" or not path.stem.startswith("_")}
    assert set(modules(root)) == public
    assert sorted(pages_of(api_navigation(root))) == sorted(api_page(module) for module in public)


def test_an_api_page_is_made_from_the_modules_docstrings() -> None:
    assert api_page("fp8/te/engine.py") == "api/fp8/te/engine.md"
    assert "\n::: counterflow.fp8.te.engine\n" in api_text("fp8/te/engine.py")


def test_the_page_of_a_package_lists_what_is_in_it() -> None:
    text = api_text("parallel/__init__.py")
    assert "- [`parallel/layout.py`](layout.md)" in text
    assert "- [`parallel/schedule/`](schedule/index.md)" in text
    assert "actions.py" not in text
    assert "- [`fp8/`](fp8/index.md)" in api_text("__init__.py")


def test_links_of_every_document_lead_to_a_page_or_a_copied_file(root: Path, project_files: list[Path]) -> None:
    sources = [path.as_posix() for path in project_files if path.parts[0] == "docs" and path.suffix == ".md"]
    pages = {f"docs/{name}" for name in pages_of([*ROOT_PAGES.values()])} | set(sources)
    files = {path.as_posix() for path in project_files}
    for source in [*sources, *ROOT_PAGES]:
        page = site_target(source, root)
        assert page is not None
        text, copied = turned((root / source).read_text("utf-8"), source, page)
        assert copied <= files
        for link in re.findall(r"\]\(([^)#\s:]+)[#)]", text):
            goal = (Path("site") / page).parent / link
            target = "/".join(_resolved(goal.parts[1:]))
            known = {api_page(module) for module in modules(root)} | copied
            assert target in known or f"docs/{target}" in pages | files, f"{source}: {link}"


def _resolved(parts: tuple[str, ...]) -> list[str]:
    resolved: list[str] = []
    for part in parts:
        resolved = resolved[:-1] if part == ".." else [*resolved, part]
    return resolved


@pytest.mark.parametrize(
    ("source", "page", "link", "expected"),
    [
        ("README.md", "index.md", "docs/fp8.md#audit", "fp8.md#audit"),
        ("README.md", "index.md", "training/trainer.py", "api/training/trainer.md"),
        ("README.md", "index.md", "CONTRIBUTING.md", "contributing.md"),
        ("docs/fp8.md", "fp8.md", "../fp8/quantize.py", "api/fp8/quantize.md"),
        ("docs/fp8.md", "fp8.md", "../README.md", "index.md"),
        ("docs/fp8.md", "fp8.md", "training.md#data", "training.md#data"),
        ("slurm/README.md", "slurm.md", "train.sbatch", "slurm/train.sbatch"),
        ("README.md", "index.md", "no/such/file.md", "no/such/file.md"),
        ("README.md", "index.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_are_turned_towards_the_site(source: str, page: str, link: str, expected: str) -> None:
    assert turned(f"See [this]({link}).", source, page)[0] == f"See [this]({expected})."


def test_links_inside_code_blocks_stay() -> None:
    text = "```\n[a](docs/fp8.md)\n```\n"
    assert turned(text, "README.md", "index.md") == (text, set())


def test_packages_are_those_that_are_installed(root: Path, package_files: list[Path]) -> None:
    folders = {path.parent.as_posix().removeprefix(".") for path in package_files}
    assert set(packages(root)) == folders


def test_a_broken_link_fails_the_build(settings: dict[str, Any]) -> None:
    assert settings["strict"] is True
    assert set(settings["validation"]["links"].values()) == {"warn"}
