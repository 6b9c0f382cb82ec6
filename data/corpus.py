"""Sources of text: documents with names, in a stable order, split into training and held-out ones."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..settings import UsageError
from .config import DataConfig

# Parts of the standard library that are no text to learn from, or that differ between installations of one
# version: installed packages, byte code, compiled and per-machine files, generated character tables, and
# tests, which distributions ship in part, separately or not at all.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "lib-dynload", "encodings", "test", "tests", "idle_test"}
)
_SKIPPED_FOLDER_PREFIXES = ("config-",)
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py", "sitecustomize.py"})
_SKIPPED_FILE_PREFIXES = ("_sysconfigdata",)
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class TextFile:
    """A file of a source: `name` is its path relative to the source's root, with `/`."""

    name: str
    path: Path
    size: int
    modified_ns: int

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}") from error


@dataclass(frozen=True)
class Document:
    """A named text, read on demand."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """Files of a corpus, sorted by name, without empty ones."""

    kind: str
    root: Path
    files: tuple[TextFile, ...]

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the order of the files: one per file, and one per topic of Python's manual."""
        for file in self.files:
            topics = _manual_topics(file.read()) if self.kind == "builtin" and file.name == _TOPICS else {}
            if topics:
                for name, text in topics.items():
                    yield Document(f"{file.name}/{name}", text.encode)
            else:
                yield Document(file.name, file.read)


def open_source(config: DataConfig) -> Source:
    """List the files of the configured source. Raises UsageError if there is nothing to read."""
    if config.source == "builtin":
        return standard_library()
    assert config.path is not None, "DataConfig checks that source: folder has a path"
    return folder(Path(config.path).expanduser(), config.patterns)


def folder(root: Path, patterns: Sequence[str]) -> Source:
    """List the files under `root` whose name matches one of `patterns`, without hidden files and folders."""
    root = Path(os.path.abspath(root))
    wanted = ", ".join(patterns)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"data.path {root} {problem}; it should be a folder of text files ({wanted})")

    def keep(name: str) -> bool:
        return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)

    files = _list_files(root, keep, lambda name: True)
    if not files:
        raise UsageError(f"no file with text under data.path {root} matches data.patterns ({wanted})")
    return Source("folder", root, files)


def standard_library(root: Path | None = None) -> Source:
    """List sources and documentation of the running Python's standard library, or of the one in `root`.

    The list has *.py, *.txt and *.rst. Left out are installed packages, tests, generated tables (`encodings`,
    `html/entities.py`, `stringprep.py`) and descriptions of one machine (`_sysconfigdata*`, `config-*`).
    """
    root = root or Path(sysconfig.get_path("stdlib"))

    def keep(name: str) -> bool:
        base = name.rpartition("/")[2]
        return (
            base.endswith((".py", ".txt", ".rst"))
            and name not in _SKIPPED_FILES
            and not base.startswith(_SKIPPED_FILE_PREFIXES)
        )

    def enter(name: str) -> bool:
        base = name.rpartition("/")[2]
        return base not in _SKIPPED_FOLDERS and not base.startswith(_SKIPPED_FOLDER_PREFIXES)

    files = _list_files(root, keep, enter) if root.is_dir() else ()
    if not files:
        raise UsageError(
            f"this Python keeps no sources of its standard library in {root}; "
            "set data.source: folder and data.path to a folder of text files"
        )
    return Source("builtin", root, files)


def hold_out(names: Collection[str], fraction: float) -> frozenset[str]:
    """Return the names held out for validation: about `fraction` of them, by a hash of each name alone.

    Adding or removing other files therefore does not move a file between training and validation, with one exception:
    if no hash falls under `fraction`, the lowest is held out, and if all do, the highest is trained on.
    """
    if len(names) < 2:
        raise UsageError(
            f"the data has {len(names)} document{'' if len(names) == 1 else 's'}, but training and validation need "
            "at least one each: add files, or split the text into several"
        )
    ranked = sorted((_share(name), name) for name in names)
    count = sum(share < fraction for share, _ in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    return frozenset(name for _, name in ranked[:count])


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _list_files(root: Path, keep: Callable[[str], bool], enter: Callable[[str], bool]) -> tuple[TextFile, ...]:
    """Non-empty files under `root`, sorted by name, without hidden ones and byte code; links are followed."""

    def fail(error: OSError) -> None:
        raise UsageError(f"cannot list {error.filename}: {error.strerror}") from error

    files: list[TextFile] = []
    seen: set[str] = set()  # a link to a folder above would otherwise make an endless walk
    for location, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(location)
        subfolders.sort()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        prefix = "" if Path(location) == root else Path(location).relative_to(root).as_posix() + "/"
        subfolders[:] = [
            name for name in subfolders if name[0] != "." and name != "__pycache__" and enter(prefix + name)
        ]
        for name in names:
            path = Path(location, name)
            if name[0] != "." and keep(prefix + name) and path.is_file():  # is_file: false for a dangling link
                status = path.stat()
                if status.st_size:
                    files.append(TextFile(prefix + name, path, status.st_size, status.st_mtime_ns))
    return tuple(sorted(files, key=lambda file: file.name))


def _manual_topics(source: bytes) -> dict[str, str]:
    """Return the topics of Python's manual from `topics = {name: text, …}`, sorted; {} for a file of another form.

    The manual prints some sections under several topics. A topic is left out when more than half of its text is in
    longer topics: validation would otherwise run on training text.
    """
    topics: dict[str, str] = {}
    for statement in ast.parse(source).body:
        # Read, not imported: importing would run the file, and cache its module in this process.
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics.update(ast.literal_eval(statement.value))
    kept: dict[str, str] = {}
    known: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        paragraphs = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        repeated = sum(len(paragraph) for paragraph in paragraphs & known)
        if 2 * repeated <= sum(map(len, paragraphs)) and text:
            kept[name] = text
            known |= paragraphs
    return dict(sorted(kept.items()))
