"""Tables of the documents, and the arrows between folders that CONTRIBUTING.md states in one."""

from __future__ import annotations

import re


def rows_of(page: str, heading: str, skip: int = 2) -> list[list[str]]:
    """Cells of the first table after the line `heading`, without its first `skip` lines: its head."""
    _, found, after = page.partition(f"{heading}\n")
    assert found, heading
    (table, *_) = re.findall(r"(?:^ *\|.*\n)+", after, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines()[skip:]]


def arrows(contributing: str) -> dict[str, set[str]]:
    """Folders that each folder may import, from the table of *Where things go*, without itself and the root's files.

    `all above` means the folders of every earlier row, `everything` those of every row.
    """
    rows = [(_folders(first), second) for first, second in rows_of(contributing, "## Where things go")]
    everything = {folder for folders, _ in rows for folder in folders}
    above: set[str] = set()
    found: dict[str, set[str]] = {}
    for folders, allowed in rows:
        targets = set(_folders(allowed))
        targets |= above if "all above" in allowed else set()
        targets |= everything if allowed == "everything" else set()
        assert targets <= everything, f"{targets - everything} has no row"
        found |= {folder: targets - {folder} for folder in folders}
        above |= set(folders)
    return found


def _folders(cell: str) -> list[str]:
    return re.findall(r"`(\w+)/?`", cell)
