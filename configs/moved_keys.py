"""Keys of earlier versions and the names that they have now.

A configuration file or `--set` with an old key is refused with the new name (`schema.py: unknown_key`). The folders of
earlier runs stay readable: a reader of their configurations calls `translate` or `differences`.
"""

from __future__ import annotations

from typing import Any

MOVED_KEYS = {
    "train.balance_loss": "balance.expert_loss",
    "train.bias_update_speed": "balance.bias_update_speed",
    "train.capacity_factor": "balance.capacity_factor",
    "train.communication_loss": "balance.communication_loss",
    "train.compile": "run.compile",
    "train.device": "run.device",
    "train.device_loss": "balance.device_loss",
    "train.keep_sequences": "balance.keep_sequences",
    "train.recompute": "memory.recompute",
}
"""New key of each old one; version 0.1.0 has the old ones."""


def translate(written: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version wrote, as sections of keys, with today's keys."""
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in written.items()}
    for old, new in MOVED_KEYS.items():
        section, name = old.split(".")
        if isinstance(sections.get(section), dict) and name in sections[section]:
            new_section, new_name = new.split(".")
            sections.setdefault(new_section, {})[new_name] = sections[section].pop(name)
    return sections


def differences(
    written: dict[str, Any], present: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Values that differ between the configuration of an earlier start and the present one, by dotted key, sorted.

    All three arguments are sections of keys in one form. A key that the earlier version did not have counts as set to
    today's default.
    """
    before, now = _flat(translate(written)), _flat(present)
    for key, value in _flat(defaults).items():
        if not any(f"{key}.".startswith(f"{known}.") or f"{known}.".startswith(f"{key}.") for known in before):
            before[key] = value
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat
