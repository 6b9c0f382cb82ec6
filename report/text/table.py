"""Tables in text."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[tuple[str, ...]], left: frozenset[int] = frozenset()) -> list[str]:
    """Return rows of cells as lines, the heading first, with two spaces between columns.

    Columns whose index is in `left` are aligned at their beginning, others at their end. Columns that are empty below
    their heading are left out.
    """
    columns = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    widths = {index: max(len(row[index]) for row in rows) for index in columns}
    return [
        "  ".join(row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in columns).rstrip()
        for row in rows
    ]
