"""Timelines drawn as one HTML file: one row per rank, to scale, with zoom. Pointing at an action shows its times.

The page holds its data in the element `data`, as JSON: `unit`, `decimals` of the times shown, and for every timeline

  step, bubble, peak    time of the step; for each rank its bubble as written on the page, and its live micro-batches
  placement, chunks     stages of each rank; the largest number of stages on a rank
  origins               ranks that hold stage 0, if several ranks hold a stage, otherwise null
  tick                  unit of the times in `spans`
  actions, spans        for each rank the number of its actions, and the actions: Base64 of numbers

A number is a sequence of bytes with 7 bits each, the lowest bits first; all bytes but the last have 128 added. A signed
number v is written as 2v, or as -2v - 1 if it is negative. The numbers of an action are

1. `kind + 6 (chunk + chunks * chunk of the pair's backward)`; kinds are F, I, W, B, pair with a B, pair with an I;
2. its micro-batch, signed, as the difference from one more than the rank's last of this chunk and direction (F, W, or
   B and I alike); for a pair a second such number, of its backward;
3. the idle time before it, signed, in ticks;
4. its duration in ticks.

Half a million actions make a few megabytes, which a browser reads in a moment.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ...parallel.schedule.actions import Action, Overlap, Schedule
from ...parallel.schedule.timeline import Span, Timeline
from ..text.numbers import number, share
from .page import draw_page, read_asset

KINDS = "FIWB"
PRECISION = 2.0**-31  # share of the step by which a time on the page may differ from the timeline's
PAIRS = "4 5"
# Codes of the kinds that a swatch explains, and its text. The script removes swatches without a kind in the timelines.
LEGEND = (
    ("0 4 5", "F forward"),
    ("3 4", "B whole backward"),
    ("1 5", "I backward for the input"),
    ("2", "W backward for the weights"),
    (PAIRS, "pair: forward above, backward below"),
    ("", "idle"),
)


def draw_html(
    timelines: Sequence[tuple[str, Timeline]],
    unit: str = "",
    notes: Sequence[str] = (),
    title: str = "",
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = (),
) -> str:
    """Draw a page of every (name, timeline), one under the other on the same scale of time.

    `unit` is the unit of all times, "" for relative times. An empty `title` is made from the names. `notes` are
    sentences under the title. `tables` follow the pictures: a heading each and rows of text, the first row with the
    names of the columns. The same input gives the same text. The file needs no network.
    """
    assert timelines, "there is no timeline to draw"
    title = title or ("Pipeline schedule " + timelines[0][0] if len(timelines) == 1 else "Pipeline schedules compared")
    durations = [span.end - span.start for _, timeline in timelines for spans in timeline.spans for span in spans]
    data = {
        "unit": unit,
        "decimals": _decimals(math.fsum(durations) / len(durations) if durations else 1.0),
        "timelines": [_timeline_data(timeline) for _, timeline in timelines],
    }
    body = [
        *(f"<p>{escape(note)}</p>" for note in notes),
        _bar(),
        "<noscript><p>The pictures are drawn by a script, which this browser does not run. The numbers are below.</p>"
        "</noscript>",
        *(_section(index, name, timeline, unit) for index, (name, timeline) in enumerate(timelines)),
        *(_table(heading, rows) for heading, rows in tables),
        '<div class="tip" id="tip" hidden></div>',
        '<div class="spoken" id="spoken" aria-live="polite"></div>',
    ]
    style = read_asset(__package__, "timeline.css")
    script = "".join(read_asset(__package__, name) for name in ("timeline.js", "timeline_controls.js"))
    return draw_page(title, "\n".join(body), style, script, data)


def _table(heading: str, rows: Sequence[Sequence[str]]) -> str:
    columns, *rest = rows
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rest
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section><h2>{escape(heading)}</h2><div class="table words">{table}</div></section>'


def _bar() -> str:
    items = (
        f'<span data-kinds="{kinds}"><i{pair}></i>{text}</span>'
        for kinds, text in LEGEND
        for pair in [' class="pair"' if kinds == PAIRS else ""]
    )
    return f"""<div class="legend" id="legend">{"".join(items)}</div>
<p class="keys soft">Zoom with Ctrl and the wheel, a pinch or a double click; drag to move. In a picture the arrow \
keys lead from action to action, + and - zoom, 0 shows the whole step.</p>
<div class="moves"><button id="out" aria-label="Zoom out">&minus;</button>
<button id="in" aria-label="Zoom in">+</button><button id="whole">Whole step</button>
<div class="strip" id="strip"><i id="thumb"></i></div><span class="window" id="window"></span></div>"""


def _section(index: int, name: str, timeline: Timeline, unit: str) -> str:
    """Frame of one picture: its name, the figures of the whole step, the canvas, a table of the ranks."""
    schedule, time = timeline.schedule, f" {unit}" if unit else ""
    facts = (
        ("step", number(timeline.step_time) + time),
        ("bubble", share(timeline.bubble_fraction)),
        ("copies of the parameters", number(timeline.parameter_copies)),
        ("peak live micro-batches", str(max(timeline.peak_microbatches, default=0))),
        ("ranks", str(schedule.num_ranks)),
        ("stages", str(schedule.num_stages)),
        ("micro-batches", str(schedule.num_microbatches)),
    )
    label = f"Timeline of {name}. Arrow keys read out each action."
    return f"""<section aria-labelledby="name-{index}">
<h2 id="name-{index}">{escape(name)}</h2>
<div class="facts">{" ".join(f"<span>{fact} <b>{escape(value)}</b></span>" for fact, value in facts)}</div>
{_shades(schedule)}
<div class="figure" id="figure-{index}"><canvas aria-hidden="true"></canvas>
<canvas tabindex="0" role="application" aria-label="{escape(label)}"></canvas></div>
<details><summary>Numbers of each rank</summary><div class="table"><table><thead><tr><th>rank</th><th>stages</th>
<th>bubble{escape(time)}</th><th>share</th><th>peak live micro-batches</th></tr></thead><tbody>
{"".join(_table_rows(timeline))}</tbody></table></div></details>
</section>
"""


def _shades(schedule: Schedule) -> str:
    """Sentence on the meaning of dark and light in this picture."""
    origins = _origins(schedule)
    if origins and len(origins) == 2:
        meaning = f"Dark: micro-batches that enter at rank {origins[0]}. Light: at rank {origins[1]}."
    elif origins:
        meaning = f"Dark to light: micro-batches that enter at rank {', '.join(map(str, origins))}."
    elif max(map(len, schedule.stages_of_rank)) > 1:
        meaning = "Dark to light: a rank's stages in the order in which a micro-batch passes them."
    else:
        return ""
    return f'<p class="shade soft">{meaning}</p>'


def _table_rows(timeline: Timeline) -> Iterable[str]:
    step = timeline.step_time
    columns = zip(timeline.schedule.stages_of_rank, timeline.bubble, timeline.peak_microbatches, strict=True)
    for rank, (stages, bubble, peak) in enumerate(columns):
        cells = (rank, ", ".join(map(str, stages)), number(bubble), share(bubble / step if step else 0.0), peak)
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _origins(schedule: Schedule) -> tuple[int, ...] | None:
    """Ranks where micro-batches enter a pipeline that holds stages more than once; None for any other pipeline."""
    held = [stage for stages in schedule.stages_of_rank for stage in stages]
    return schedule.holders(0) if len(held) > len(set(held)) else None


def _timeline_data(timeline: Timeline) -> dict[str, Any]:
    schedule, step = timeline.schedule, timeline.step_time
    chunks = max(map(len, schedule.stages_of_rank))
    tick = _tick(timeline)
    return {
        "step": step,
        "bubble": [[number(bubble), share(bubble / step if step else 0.0)] for bubble in timeline.bubble],
        "peak": list(timeline.peak_microbatches),
        "placement": schedule.stages_of_rank,
        "chunks": chunks,
        "origins": _origins(schedule),
        "tick": tick,
        "actions": [len(spans) for spans in timeline.spans],
        "spans": [
            base64.b64encode(_pack(spans, stages, chunks, tick)).decode()
            for spans, stages in zip(timeline.spans, schedule.stages_of_rank, strict=True)
        ],
    }


def _tick(timeline: Timeline) -> float:
    """Largest power of ten that divides all times, so that they are exact and take few bytes.

    Measured times have no such divisor: they are rounded to PRECISION of the step.
    """
    step = timeline.step_time
    shortest = min((s.end - s.start for spans in timeline.spans for s in spans if s.end > s.start), default=0.0)
    if step <= 0 or shortest <= 0:
        return 1.0
    start = math.floor(math.log10(shortest))
    for exponent in range(start, start - 5, -1):
        tick = 10.0**exponent
        if all(
            abs(time - round(time / tick) * tick) <= step * PRECISION / 2
            for spans in timeline.spans
            for span in spans
            for time in (span.start, span.end)
        ):
            return tick
    return step * PRECISION


def _pack(spans: Sequence[Span], stages: Sequence[int], chunks: int, tick: float) -> bytes:
    """Actions of a rank in the bytes that the module's docstring describes."""
    packed = bytearray()
    following: dict[tuple[str, int], int] = {}
    chunk_of = {stage: chunk for chunk, stage in enumerate(stages)}

    def put(value: int) -> None:
        while value > 127:
            packed.append(value & 127 | 128)
            value >>= 7
        packed.append(value)

    def put_microbatch(action: Action) -> None:
        key = ("B" if action.kind == "I" else action.kind, action.stage)
        put(_unsigned(action.microbatch - following.get(key, 0)))
        following[key] = action.microbatch + 1

    clock = 0
    for action, start, end in spans:
        if isinstance(action, Overlap):
            kind = 4 if action.backward.kind == "B" else 5
            put(kind + 6 * (chunk_of[action.forward.stage] + chunks * chunk_of[action.backward.stage]))
            put_microbatch(action.forward)
            put_microbatch(action.backward)
        else:
            put(KINDS.index(action.kind) + 6 * chunk_of[action.stage])
            put_microbatch(action)
        from_tick, to_tick = round(start / tick), round(end / tick)
        put(_unsigned(from_tick - clock))
        put(to_tick - from_tick)
        clock = to_tick
    return bytes(packed)


def _unsigned(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _decimals(typical: float) -> int:
    """Number of decimals that show a time of this size to three digits or more, at least one."""
    return max(1, min(9, math.ceil(-math.log10(typical)) + 2)) if typical > 0 else 1
