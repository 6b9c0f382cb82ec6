"""Files that a CONFIG or a `base:` names."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .. import configs
from ..settings import UsageError


@dataclass(frozen=True)
class ConfigSource:
    """The text of a YAML file. `shown` is its name in messages; its relative paths start from `folder`."""

    text: str
    shown: str
    folder: Path
    identity: Path

    @property
    def stem(self) -> str:
        """Name of the file without `.yaml`."""
        return self.identity.stem


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(Path(entry.name).stem for entry in files(configs).iterdir() if entry.name.endswith(".yaml"))


def find(name: str, folder: Path = Path()) -> ConfigSource:
    """Return the file that `name` means: a path, relative to `folder`, or the name of a shipped config.

    A name that ends in .yaml or .yml, or has a slash, is a path. Raises UsageError where there is no such file.
    """
    is_path = name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name
    if not is_path and name in shipped():
        path = Path(str(files(configs) / f"{name}.yaml"))
    else:
        path = folder / Path(name).expanduser()
        if not path.is_file():
            raise UsageError(_not_found(name, path, is_path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {show(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{show(path)} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    return ConfigSource(text, show(path), path.parent, path.resolve())


def show(path: Path) -> str:
    """Return the shortest form of a path, absolute or relative to the current folder."""
    short = os.path.normpath(path)
    inside = os.path.relpath(short)
    return short if inside.startswith(os.pardir) else inside


def run_name(stem: str) -> str:
    """Make the name of a run, which can be a folder's, from the name of its config file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "run"


def _not_found(name: str, path: Path, is_path: bool) -> str:
    names = shipped()
    near = difflib.get_close_matches(Path(name).stem if is_path else name, names, n=1, cutoff=0.5)
    meant = f" (did you mean {near[0]}?)" if near else ""
    if path.is_dir():
        problem = f"{show(path)} is a folder, not a config"
    elif is_path:
        problem = f"there is no file {show(path)}"
    else:
        problem = f"no config is called {name!r}"
    return f"{problem}{meant}; shipped: {', '.join(names)}; or give the path of a .yaml file"
