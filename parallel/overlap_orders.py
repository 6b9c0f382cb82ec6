"""Orders in which the phases of an overlapped pair advance: data, so that another order is another tuple.

An entry is a phase of the pair's forward (F.attention) or backward (B.experts), or W: run the weight gradients that
wait. The order repeats until both sides have ended; an entry whose phase is not its side's next one is skipped.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..settings import UsageError

FORWARD_PHASES = ("embedding", "dense", "attention", "dispatch", "shared", "experts", "combine", "finish", "head")
"""The phases of a chunk's forward, as `model/block.py` and `model/transformer.py` name them."""
REDONE_PHASES = tuple(f"redo.{phase}" for phase in ("dense", "attention", "dispatch", "shared", "experts"))
"""Phases that a backward runs again with full recompute."""
ENTRIES = (
    "W",
    *(f"F.{phase}" for phase in FORWARD_PHASES),
    *(f"B.{phase}" for phase in (*FORWARD_PHASES, *REDONE_PHASES)),
)

V3 = (
    # The order inside a layer pair of DeepSeek's published trace (V3 Figure 4), with every transfer launched as soon as
    # its data is ready. The comments list the transfers that run while the phase computes.
    "B.finish",  # sends gradients to the experts: combine(B)
    "W",  # combine(F) of the layer before, combine(B)
    "F.finish",
    "F.attention",  # combine(B); its end sends the counts of rows
    "B.combine",  # work for a GPU while the host waits for these counts
    "F.dispatch",
    "B.redo.attention",  # with full recompute: combine(B), dispatch(F)
    "B.redo.dispatch",
    "B.combine",
    "B.experts",  # dispatch(F); its end sends the gradients back: dispatch(B)
    "B.shared",  # dispatch(F), dispatch(B)
    "W",
    "F.shared",
    "F.experts",  # dispatch(B), or with full recompute the repeated dispatch
    "F.combine",
    "B.redo.shared",  # with full recompute these could not run before
    "B.redo.experts",
    "B.combine",
    "B.experts",
    "B.shared",
    "W",
    "B.dispatch",
    "B.attention",  # combine(F)
)

ORDERS: dict[str, tuple[str, ...]] = {"v3": V3, "sequence": ()}
"""Orders by name. The empty one runs the whole forward and then the whole backward."""


def find_order(order: str | Sequence[str]) -> tuple[str, ...]:
    """Return the order of that name, or the given one; raises UsageError for an unknown name or phase."""
    if isinstance(order, str):
        if order not in ORDERS:
            raise UsageError(f"{order!r} is no order of phases; there are {', '.join(ORDERS)}, or a list of phases")
        return ORDERS[order]
    for entry in order:
        if entry not in ENTRIES:
            near = difflib.get_close_matches(entry, ENTRIES, n=1)
            known = f"did you mean {near[0]}?" if near else f"such as {ENTRIES[0]}, F.attention or B.experts"
            raise UsageError(f"{entry!r} is no phase of a pair ({known})")
    return tuple(order)
