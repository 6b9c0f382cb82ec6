"""Pages of the site that are not in docs/: the documents of the root, and an API page for each module.

mkdocs calls the `on_…` functions (`hooks` of mkdocs.yml). In the repository links have the form that works in a clone:
documents of the root link into docs/, and pages of docs/ link to sources. Here each link is turned towards the site's
own page. A source without a page is copied into the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_COPY = ROOT / "build" / "package" / "counterflow"
"""Where the API pages read the package: the clone itself has tests, runs and an environment in it."""

ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "slurm/README.md": "slurm.md",
}
"""Documents outside docs/, with their names in the site."""

LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def packages(root: Path = ROOT) -> list[str]:
    """Folders of the package in order, the root as an empty string."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    names = project["tool"]["setuptools"]["packages"]
    return [name.removeprefix("counterflow").lstrip(".").replace(".", "/") for name in names]


def modules(root: Path = ROOT) -> list[str]:
    """Public modules as paths from the root, such as `fp8/linear.py`; a package is its `__init__.py`."""
    found = [path for folder in packages(root) for path in sorted((root / folder).glob("*.py"))]
    public = [path for path in found if path.stem == "__init__" or not path.stem.startswith("_")]
    return [path.relative_to(root).as_posix() for path in public]


def api_page(module: str) -> str:
    """Path in the site of the page of a module."""
    folder, _, name = module.rpartition("/")
    stem = "index" if name == "__init__.py" else name.removesuffix(".py")
    return posixpath.join("api", folder, f"{stem}.md")


def api_text(module: str, root: Path = ROOT) -> str:
    """Markdown of a module's page; that of a package lists its modules and packages."""
    dotted = ".".join(["counterflow", *module.removesuffix(".py").split("/")]).removesuffix(".__init__")
    title = module.removesuffix("__init__.py") or "counterflow"
    text = f"# {title}\n\n::: {dotted}\n"
    if not module.endswith("__init__.py"):
        return text
    text += "    options:\n      members: []\n\n"
    for other in modules(root):
        if other != module and posixpath.dirname(other.removesuffix("/__init__.py")) == posixpath.dirname(module):
            link = posixpath.relpath(api_page(other), posixpath.dirname(api_page(module)))
            text += f"- [`{other.removesuffix('__init__.py')}`]({link})\n"
    return text


def api_navigation(root: Path = ROOT) -> list[Any]:
    """Nested navigation of the API pages: first a package's own page, then its modules, then its packages."""

    def entries(folder: str) -> list[Any]:
        inside = [module for module in modules(root) if posixpath.dirname(module) == folder]
        inside.sort(key=lambda module: not module.endswith("__init__.py"))
        pages: list[Any] = [
            api_page(module) if module.endswith("__init__.py") else {posixpath.basename(module): api_page(module)}
            for module in inside
        ]
        below = [other for other in packages(root) if other and posixpath.dirname(other) == folder]
        return pages + [{f"{posixpath.basename(other)}/": entries(other)} for other in below]

    return entries("")


def site_target(target: str, root: Path = ROOT) -> str | None:
    """Path in the site of a file of the repository given by its path; None where the site has no such file."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target in modules(root):
        return api_page(target)
    return target if (root / target).is_file() else None


def turned(markdown: str, source: str, page: str) -> tuple[str, set[str]]:
    """Markdown of the repository's file `source` with links as the site's `page` needs them.

    Returns with it the files that are linked and have no page. A link to nothing stays, and mkdocs reports it.
    """
    copied: set[str] = set()

    def turn(found: re.Match[str]) -> str:
        start, link, rest = found.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        goal = site_target(target)
        if goal is None:
            return found[0]
        if goal == target:
            copied.add(target)
        return f"{start}{posixpath.relpath(goal, posixpath.dirname(page) or '.')}{rest}"

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(turn, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    pieces.append(LINK.sub(turn, markdown[end:]))
    return "".join(pieces), copied


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the package for the API pages, and add their navigation."""
    shutil.rmtree(PACKAGE_COPY, ignore_errors=True)
    for module in [*modules(), "py.typed"]:
        (PACKAGE_COPY / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / module, PACKAGE_COPY / module)
    assert config.nav is not None, "mkdocs.yml has a nav"
    config.nav = [*config.nav, {"API": api_navigation()}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the sources that pages link to."""
    from mkdocs.structure.files import File

    for module in modules():
        files.append(File.generated(config, api_page(module), content=api_text(module)))
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked: set[str] = set()
    for file in list(files.documentation_pages()):
        if not file.src_uri.startswith("api/"):
            linked |= turned(file.content_string, repository_path(file.src_uri), file.src_uri)[1]
    for path in sorted(linked):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page towards the site."""
    uri = page.file.src_uri
    return markdown if uri.startswith("api/") else turned(markdown, repository_path(uri), uri)[0]


def repository_path(page: str) -> str:
    """Path in the repository of a page of the site that is written by hand."""
    sources = {name: source for source, name in ROOT_PAGES.items()}
    return sources.get(page, f"docs/{page}")
