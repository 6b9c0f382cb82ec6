"""Simulated steps in words and tables of 80 columns, as `counterflow simulate` prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ...parallel.schedule.timeline import Timeline
from ...plan.simulation import Case, ConfigCase, NumbersCase
from .lines import WIDTH, wrap_row
from .numbers import count, number, plural, share
from .split import describe_split
from .table import align
from .timeline import draw_text

INDENT = 13  # columns before the texts of rows
FEW_RANKS = 8
"""Largest number of ranks of which each gets a row of its own."""


def report(case: Case, timeline: Timeline) -> str:
    """Return the step in words, the split, the picture and, for few ranks, a row for each."""
    split = describe_split(case.config) if isinstance(case, ConfigCase) else None
    parts = [_summary(case, timeline), split, draw_text(timeline, WIDTH)]
    if 1 < timeline.schedule.num_ranks <= FEW_RANKS:
        parts.append(_ranks(timeline))
    return "\n\n".join(part for part in parts if part)


def compare_table(case: Case, outcomes: Mapping[str, Timeline | str]) -> str:
    """Return a table of schedules, the fastest first; behind it the reasons of schedules that refuse."""
    simulated = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Timeline)}
    rows: list[tuple[str, ...]] = [
        ("schedule", "stages", "step time", "bubble", "worst rank", "activations", "parameters")
    ]
    for name, timeline in sorted(simulated.items(), key=lambda item: item[1].step_time):
        schedule = timeline.schedule
        live = max(timeline.peak_microbatches) * schedule.num_ranks / schedule.num_stages
        rows.append(
            (
                name,
                str(schedule.num_stages),
                number(timeline.step_time),
                share(timeline.bubble_fraction),
                number(max(timeline.bubble)),
                f"{live:.3g} x",
                f"{timeline.parameter_copies:.3g} x",
            )
        )
    lines = [f"{count(case.num_ranks, 'rank')}, {count(case.num_microbatches, 'micro-batch', 'es')}"]
    lines += [*wrap_row("costs", "; ".join(assumptions(case)), INDENT), ""]
    if simulated:
        lines += align(rows, frozenset({0}))
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            lines += wrap_row(name, f"cannot: {outcome}", width + 2)
    lines += ["", *textwrap.wrap(_LEGEND, WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)


_LEGEND = (
    "Bubble: share of all ranks' time without work; worst rank: how long the one that waits most does. Activations: "
    "the most that a rank holds at once, in micro-batches of 1/P of the layers, taking stages as equal. Parameters: "
    "copies of each stage."
)


def assumptions(case: Case) -> list[str]:
    """Return sentences on where the numbers of a case come from."""
    if isinstance(case, NumbersCase):
        costs = f"F {case.forward:g}, I {case.backward_input:g}, W {case.backward_weight:g}, pair {case.pair:.4g}"
        by = "2.5/3 of its parts" if case.pair > case.longer_half else "as long as its longer half"
        assumed = "" if case.overlapped is not None else f" (assumed: {by})"
        p2p = f", transfer {case.p2p:g}" if case.p2p else ""
        return [f"{costs}{assumed}{p2p}"]
    assert isinstance(case, ConfigCase), case
    origin = f"{case.unit}, predicted" if case.predicted else "parallel.stage_costs"
    assumed = " (assumed)" if case.pair_ratio is None else ""
    p2p = f", a transfer {case.transfer:.4g}" if case.p2p else ""
    lines = [f"{origin}; a pair takes {case.ratio:.3g} of its parts' time{assumed}{p2p}"]
    if case.assumed_dp is not None:
        lines.append(f"parallel.dp is auto, taken as {case.assumed_dp}: more leaves fewer micro-batches")
    return lines


def _summary(case: Case, timeline: Timeline) -> str:
    schedule, unit = timeline.schedule, f" {case.unit}" if case.unit else ""
    peak = timeline.peak_microbatches
    fullest = peak.index(max(peak))
    who = "every rank holds" if schedule.num_ranks > 1 and min(peak) == max(peak) else f"rank {fullest} holds"
    held = f"{who}{' most,' * (min(peak) < max(peak))} {count(peak[fullest], 'micro-batch', 'es')} at a time"
    if any(len(stages) > 1 for stages in schedule.stages_of_rank):
        held += ", each of one stage"
    of = f"{count(schedule.num_stages, 'stage')} on {count(schedule.num_ranks, 'rank')}"
    first, *more = assumptions(case)
    rows = [
        ("schedule", f"{schedule.name}, {of}, {count(schedule.num_microbatches, 'micro-batch', 'es')}"),
        ("costs", first),
        *(("", line) for line in more),
        ("step time", f"{number(timeline.step_time)}{unit}"),
        ("bubble", f"{share(timeline.bubble_fraction)} of all ranks' time{_longest_wait(timeline, unit)}"),
        ("activations", held),
        ("parameters", f"{timeline.parameter_copies:.3g} {plural(timeline.parameter_copies, 'copy', 'copies')} of "
         "each stage"),
    ]  # fmt: skip
    return "\n".join(line for name, text in rows for line in wrap_row(name, text, INDENT))


def _longest_wait(timeline: Timeline, unit: str) -> str:
    """Return `; rank 0 waits longest, 1.5`, or nothing where no rank waits. Equal sums of times may differ a little."""
    bubble, least = timeline.bubble, 1e-9 * timeline.step_time
    longest = max(bubble)
    if longest <= least:
        return ""
    wait = f"{number(longest)}{unit}"
    if longest - min(bubble) <= least:
        return f"; every rank waits {wait}"
    return f"; rank {bubble.index(longest)} waits longest, {wait}"


def _ranks(timeline: Timeline) -> str:
    rows: list[tuple[str, ...]] = [("rank", "stages", "busy", "bubble", "share", "activations")]
    for rank, (waits, peak) in enumerate(zip(timeline.bubble, timeline.peak_microbatches, strict=True)):
        stages = " ".join(map(str, timeline.schedule.stages_of_rank[rank]))
        part = share(waits / timeline.step_time)
        rows.append((str(rank), stages, number(timeline.step_time - waits), number(waits), part, str(peak)))
    return "\n".join(align(rows, frozenset({1})))
