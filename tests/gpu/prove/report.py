"""Results of one part of the proof, written to its JSON file with every entry."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATUSES = ("passed", "failed", "error", "crashed", "timed out", "skipped", "running")


class Report:
    """Numbers, tables and checks of one part. A file that says `running` belongs to a part that was cut off."""

    def __init__(self, folder: Path, part: str, about: str) -> None:
        self.path = folder / f"{part}.json"
        self.started = time.time()
        self.data: dict[str, Any] = {
            "part": part,
            "about": about,
            "status": "running",
            "seconds": 0.0,
            "numbers": {},
            "tables": {},
            "checks": [],
            "error": None,
        }
        self.write()

    def number(self, name: str, value: Any) -> None:
        """Note a figure, under a name with its unit."""
        self.data["numbers"][name] = plain(value)
        self.write()

    def row(self, table: str, **values: Any) -> None:
        """Add a row to a table."""
        self.data["tables"].setdefault(table, []).append({name: plain(value) for name, value in values.items()})
        self.write()

    def check(self, name: str, holds: bool, seen: Any = None) -> None:
        """Note whether a claim holds, and what was seen."""
        self.data["checks"].append({"check": name, "holds": bool(holds), "seen": plain(seen)})
        self.write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Context whose errors are noted as a failed check; the part goes on behind it."""
        try:
            yield
        except Exception as error:
            self.check(name, False, f"{type(error).__name__}: {error}"[:600])

    def finish(self, status: str = "", error: str | None = None) -> None:
        """Note the end of the part. By default its status follows from its checks."""
        failed = not all(check["holds"] for check in self.data["checks"])
        self.data["status"] = status or ("failed" if failed else "passed")
        self.data["error"] = error
        self.write()

    def write(self) -> None:
        self.data["seconds"] = round(time.time() - self.started, 2)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: short numbers, and words for what is not finite."""
    if isinstance(value, torch.Tensor):
        return plain(value.item()) if value.numel() == 1 else [plain(x) for x in value.tolist()]
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(x) for x in value]
    return str(value)
