"""Numbers and counted things as a person reads them."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """`value` to four digits, without an exponent where a person would write none."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.3e}"


def share(value: float) -> str:
    """A part of the whole, 1.0 = all of it, in percent."""
    return f"{100 * value:.1f}%"


def count(things: int, name: str, ending: str = "s") -> str:
    """A number of things with their name: 1 rank, 2 ranks. `ending` makes the plural."""
    return f"{things} {plural(things, name, name + ending)}"


def plural(value: float, one: str, many: str) -> str:
    """The word that fits `value`: `one` for exactly 1, otherwise `many`."""
    return one if value == 1 else many


def format_count(value: float) -> str:
    """A count in at most six characters: 987, 12.3K, 671.0B."""
    if not math.isfinite(value):
        return str(value)
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor * 0.99995:  # 999,950 would read 1000.0K
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Bytes in at most nine characters: 987 B, 12.3 KiB, 671.0 MiB."""
    for factor, suffix in ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if abs(value) >= factor * 0.99995:
            return f"{value / factor:.1f} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """A time as 1:05, 2:03:04 or 12d 03h; "--:--" for a duration that is not known yet (not finite)."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
