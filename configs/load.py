"""Loading of a configuration: a YAML file on top of its bases, `--set` on top of the file, checked as a whole.

`load_config` either returns a complete `Config` or raises `ConfigError` with all faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..settings import UsageError
from .config import Config
from .faults import validate
from .huggingface import read_architecture
from .located_yaml import Fault, Located, Location, merge, parse_yaml
from .source import ConfigSource, find, run_name, show


class ConfigError(UsageError):
    """A configuration that cannot work. `faults` holds all its faults, in the order of the files."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(sorted(dict.fromkeys(faults), key=_position))
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the configuration", *(f"  {fault}" for fault in self.faults)]))


def _position(fault: Fault) -> tuple[bool, int, str, int]:
    """Order of faults: the config itself by line, then its bases, the command line last."""
    location = fault.location
    return location.level < 0, location.level, location.source, location.line or 0


def load_config(config: str, overrides: Sequence[str] = ()) -> Config:
    """Load CONFIG, a path or the name of a shipped config, with `overrides` of the form "a.b=value" on top.

    Raises UsageError where there is no such file, and ConfigError, a UsageError too, with all faults of the contents.
    """
    source = find(config)
    faults: list[Fault] = []
    on_top = _read_overrides(overrides, faults)
    try:
        tree = merge(_read_layers(source, (), faults), on_top)
    except _Unreadable:
        raise ConfigError(faults) from None
    result, more = validate(_with_run_name(tree, source))
    if faults or result is None:
        raise ConfigError([*faults, *more])
    return result


class _Unreadable(Exception):
    """A needed file that cannot be read; without the file every other fault could be false."""


def _read_layers(source: ConfigSource, above: tuple[ConfigSource, ...], faults: list[Fault]) -> Located:
    """Read a file and merge it on top of its bases; `above` are the files above it, which have it as a base."""
    top = Location(source.shown, 1, level=len(above))
    tree = parse_yaml(source.text, top, faults)
    if tree is None:
        raise _Unreadable
    if not isinstance(tree.value, dict | None):
        faults.append(Fault(top, "", "expects sections, such as `model:` and `train:`"))
        raise _Unreadable
    layer = _without_commands(Located(tree.mapping, top), source.folder, faults)
    base = tree.mapping.get("base")
    if base is None:
        return layer
    chain = (*above, source)
    try:
        if not isinstance(base.value, str):
            raise UsageError("expects the path of a YAML file or the name of a shipped config")
        base_file = find(base.value, source.folder)
        if base_file.identity in [file.identity for file in chain]:
            raise UsageError("makes a circle: " + " -> ".join([*(file.shown for file in chain), base_file.shown]))
    except UsageError as error:
        faults.append(Fault(base.location, "base", str(error)))
        raise _Unreadable from None
    return merge(_read_layers(base_file, chain, faults), layer)


def _without_commands(layer: Located, folder: Path, faults: list[Fault]) -> Located:
    """Return a file's own keys, without `base` and with `model: from` replaced by the keys of that file.

    A section that is null, such as `log:` with nothing but comments below, becomes one without keys.
    """
    sections = {name: entry for name, entry in layer.mapping.items() if name != "base"}
    for name, entry in sections.items():
        if entry.value is None:
            sections[name] = Located({}, entry.location)
    model = sections.get("model")
    origin = model.mapping.get("from") if model else None
    if model is None or origin is None:
        return Located(sections, layer.location)
    own = Located({name: entry for name, entry in model.mapping.items() if name != "from"}, model.location)
    if isinstance(origin.value, str):
        path = folder / Path(origin.value).expanduser()
        read = read_architecture(path, show(path), origin.location, faults)
        sections["model"] = merge(Located(dict(read), model.location), own)
    else:
        faults.append(Fault(origin.location, "model.from", "expects the path of a Hugging Face config.json"))
        sections["model"] = own
    return Located(sections, layer.location)


def _read_overrides(overrides: Sequence[str], faults: list[Fault]) -> Located:
    """Return all `--set a.b=value` as one layer, later ones over earlier ones."""
    tree = Located({}, Location("--set", level=-1))
    for override in overrides:
        location = Location(f"--set {override}", level=-1)
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            faults.append(Fault(location, "", "expects KEY=VALUE with a dotted key, such as optim.lr=1e-4"))
            continue
        if parts[0] == "base":
            faults.append(Fault(location, "", "a base is given in a file only"))
            continue
        value = parse_yaml(text, location, faults)
        if value is None:
            continue
        for part in reversed(parts):
            value = Located({part: value}, location)
        tree = merge(tree, value)
    return _without_commands(tree, Path(), faults)


def _with_run_name(tree: Located, source: ConfigSource) -> Located:
    """Return the tree with the name of the config as `run.name` where no other is given."""
    run = tree.mapping.get("run")
    if run is not None and not isinstance(run.value, dict):
        return tree
    named = Located({"name": Located(run_name(source.stem), tree.location)}, run.location if run else tree.location)
    return merge(Located({"run": named}, tree.location), tree)
