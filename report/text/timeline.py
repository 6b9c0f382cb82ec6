"""A timeline drawn for a terminal: one row per rank, to scale. Plain ASCII, 80 columns.

Where every action is at least one column wide, each is a box, labelled with its micro-batch if the label fits.
Otherwise a column stands for several actions, and a row shows each kind in proportion to its time.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from ...parallel.schedule.actions import Action, Overlap
from ...parallel.schedule.timeline import Span, Timeline
from .lines import WIDTH
from .numbers import count, number, plural, share

ALL_RANKS = 32  # most rows that are drawn; with more ranks, the first and the last
LEAST_WIDTH = 40
IDLE, PAIR = ".", "X"
MEANING = {"F": "forward", "B": "whole backward", "I": "backward for the input", "W": "backward for the weights"}


def draw_text(timeline: Timeline, width: int = WIDTH, unit: str = "") -> str:
    """Picture of `timeline` in at most `width` columns (40 or more), without a newline at the end.

    It has the figures of the step, a row for each rank with its bubble and its peak of live micro-batches, an axis of
    time in `unit`, and the meaning of the characters.
    """
    assert width >= LEAST_WIDTH, f"a timeline is drawn in {LEAST_WIDTH} columns or more, not {width}"
    ranks = len(timeline.spans)
    label = max(len(str(ranks - 1)), len("rank"))
    columns = width - label - len(" || 100.0%  peak")
    scale = columns / timeline.step_time if timeline.step_time else 0.0
    shortest = min((s.end - s.start for spans in timeline.spans for s in spans if s.end > s.start), default=0.0)
    boxes = shortest * scale >= 1 - 1e-9
    draw = _draw_boxes if boxes else _draw_shares

    lines = textwrap.wrap(describe_timeline(timeline, unit), width)
    lines += ["", f"{'rank':>{label}} {'':{columns + 2}} bubble  peak"]
    bubbles = timeline.bubble
    for rank in _pick(ranks):
        if rank is None:
            lines.append(f"{'...':>{label}}")
            continue
        bubble = bubbles[rank] / timeline.step_time if timeline.step_time else 0.0
        row = draw(timeline.spans[rank], columns, scale)
        lines.append(f"{rank:>{label}} |{row}| {share(bubble):>6}  {timeline.peak_microbatches[rank]:>4}")
    lines += [" " * (label + 2) + line for line in _draw_axis(timeline.step_time, columns, scale, unit)]
    lines += ["", *textwrap.wrap(_legend(timeline, boxes), width)]
    return "\n".join(line.rstrip() for line in lines)


def describe_timeline(timeline: Timeline, unit: str = "") -> str:
    """Summary in one line: the schedule, its size, and its costs."""
    schedule = timeline.schedule
    sizes = (
        count(schedule.num_ranks, "rank"),
        count(schedule.num_stages, "stage"),
        count(schedule.num_microbatches, "micro-batch", "es"),
    )
    time = f"{number(timeline.step_time)} {unit}".rstrip()
    copies = f"{number(timeline.parameter_copies)} {plural(timeline.parameter_copies, 'copy', 'copies')}"
    costs = f"step {time}, bubble {share(timeline.bubble_fraction)}, {copies} of the parameters"
    return f"{schedule.name}: {', '.join(sizes)}; {costs}"


def _draw_boxes(spans: Sequence[Span], columns: int, scale: float) -> str:
    """A row with a box for each action, from its start to its end, both rounded to the nearest column."""
    row = [IDLE] * columns
    for action, start, end in spans:
        first, last = math.floor(start * scale + 0.5), min(math.floor(end * scale + 0.5), columns)
        row[first:last] = _box(action, last - first)
    return "".join(row)


def _box(action: Action | Overlap, width: int) -> str:
    """A box: its kind and micro-batch, or its kind alone, filled up with dashes. So every letter begins a box."""
    if isinstance(action, Overlap):
        full = f"{PAIR}{action.forward.microbatch}/{action.backward.microbatch}"
    else:
        full = f"{action.kind}{action.microbatch}"
    return (full if len(full) <= width else _letter(action))[:width].ljust(width, "-")


def _draw_shares(spans: Sequence[Span], columns: int, scale: float) -> str:
    """A row whose columns hold several actions each; every kind, and idle time, gets its share of the columns.

    A column shows one of the kinds that it holds. The choice is the kind with the largest debt: the sum of its shares
    in the columns so far, less the columns that it was given.
    """
    owed: dict[str, float] = {}
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    for action, start, end in spans:
        letter, first, last = _letter(action), start * scale, min(end * scale, columns)
        for column in range(math.floor(first), math.ceil(last)):
            part = min(last, column + 1) - max(first, column)
            shares[column][letter] = shares[column].get(letter, 0.0) + part
    row = []
    for held in shares:
        held[IDLE] = max(1 - sum(held.values()), 0.0)
        for letter, part in held.items():
            owed[letter] = owed.get(letter, 0.0) + part
        here = [letter for letter, part in held.items() if part > 1e-9]
        chosen = max(here, key=lambda letter: (round(owed[letter], 9), letter))
        owed[chosen] -= 1
        row.append(chosen)
    return "".join(row)


def _letter(action: Action | Overlap) -> str:
    return PAIR if isinstance(action, Overlap) else action.kind


def _draw_axis(step: float, columns: int, scale: float, unit: str) -> list[str]:
    """Two lines: marks at round times, and the times under them."""
    if not step:
        return []
    rough = step / max(columns // 12, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    between = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    marks, times = [" "] * columns, ""
    for index in range(math.floor(step / between + 1e-9) + 1):
        column = min(math.floor(index * between * scale + 0.5), columns - 1)
        marks[column] = "+"
        text = number(index * between)
        if not times or column > len(times):
            times = times.ljust(column) + text
    return ["".join(marks), f"{times[: columns + 8]} {unit}".rstrip()]


def _legend(timeline: Timeline, boxes: bool) -> str:
    used = {_letter(action) for spans in timeline.spans for action, *_ in spans}
    meanings = [f"{kind} {meaning}" for kind, meaning in MEANING.items() if kind in used]
    if PAIR in used:
        label = f" ({PAIR}i/j: of micro-batches i and j)" if boxes else ""
        meanings.append(f"{PAIR} a forward and a backward as one pair{label}")
    meanings.append(f"{IDLE} idle")
    scale = "" if boxes else ". A column holds several actions; each kind has its part of the row."
    return ", ".join(meanings) + scale


def _pick(ranks: int) -> list[int | None]:
    """Ranks that are drawn: all, or the first, None in place of those left out, and the last."""
    if ranks <= ALL_RANKS:
        return list(range(ranks))
    half = ALL_RANKS // 2
    return [*range(half), None, *range(ranks - half, ranks)]
