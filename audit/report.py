"""What `counterflow audit` prints for a person, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..report.text.lines import WIDTH
from ..report.text.numbers import count, format_count
from ..report.text.table import align
from .case import Case
from .result import Result, most_hurt, worst_first

MOST_HARMFUL = 12
"""Classes of tensors that are listed; the page and --json have all."""


CLASS_HEAD = ("quantised", "format", "error", "by row", "worst", "for W", "underflow", "saturated", "binades")
CLASS_NOTES = (
    "Error is ||q - x|| / ||x||; by row that of each row alone, a token's or a weight's (root mean square, and the "
    "worst); for W that of the same tensors where they are quantised along the other dimension (of inputs, once more). "
    "Underflow: share of what is not zero that became zero. Saturated: share that became the format's largest in its "
    "tile."
)


def heading(case: Case) -> str:
    """What is compared."""
    batch = case.config.batch
    tokens = batch.sequence_length * batch.global_sequences
    what = (
        f"{case.config.run.name}: {format_count(case.parameters)} parameters, {case.steps:,} steps of {tokens:,} tokens"
    )
    lines = [f"{what}, fp8 against {case.against}", *(f"here: {change}" for change in case.changes)]
    return "\n".join([*lines, f"records: {case.folder}"])


def progress_heading(against: str) -> str:
    return f"\n{'step':>7}  {'loss fp8':>8}  {'loss ' + against:>9}  {'error':>8}"


def progress_line(window: Mapping[str, float], against: str) -> str:
    """Mean losses of the steps since the line before."""
    return f"{window['step']:>7.0f}  {window['fp8']:>8.4f}  {window[against]:>9.4f}  {signed(window['error']):>8}"


def report(result: Result) -> str:
    """Everything but the curve, which was printed as it came."""
    parts = [_losses(result)]
    if result["looks"]:
        look = result["looks"][-1]
        parts += [_gradients(look), _classes(look, result["model"]["formats"])]
    if result["attribution"] is not None:
        parts.append(_attribution(result))
    return "\n\n".join(parts)


def _losses(result: Result) -> str:
    against, loss, rows = result["against"], result["loss"], []
    if result["stopped"] is not None:
        rows += textwrap.wrap(f"stopped after {count(result['steps'], 'step')}: {result['stopped']}", WIDTH)
    if loss is not None:
        of = "step" if loss["last"] == 1 else f"{loss['last']} steps"
        rows.append(_loss_row(f"mean loss, last {of}", loss, against))
    if result["validation"] is not None:
        rows.append(_loss_row("held-out text", result["validation"], against))
    rows.append(f"unigram entropy of the held-out text: {result['model']['unigram_entropy']:.4f} nats")
    return "\n".join(rows)


def _loss_row(what: str, loss: Mapping[str, float], against: str) -> str:
    return f"{what}: fp8 {loss['fp8']:.4f}, {against} {loss[against]:.4f}, error {signed(loss['error'])}"


def _gradients(look: Mapping[str, Any]) -> str:
    fp8, bf16 = look["gradients"]["fp8"], look["gradients"]["bf16"]
    rows: list[tuple[str, ...]] = [("gradients of", "error fp8", "bf16", "cosine fp8", "bf16")]
    for name, found in fp8.items():
        floor = bf16[name]
        cosines = (f"{found['cosine']:.5f}", f"{floor['cosine']:.5f}")
        rows.append((name, percent(found["error"]), percent(floor["error"]), *cosines))
    moved = look["moved"]
    where = f"At the weights of the fp8 run after step {look['step']}, against FP32. Error is ||g - g32|| / ||g32||."
    if any(moved.values()):
        where += f" Of the choices of experts {percent(moved['fp8'])} moved, and {percent(moved['bf16'])} in bf16."
    return "\n".join([*align(rows, frozenset({0})), *textwrap.wrap(where, WIDTH)])


def _classes(look: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    rows: list[tuple[str, ...]] = [(CLASS_HEAD[0], *CLASS_HEAD[2:-1])]
    rows += [(name, *cells[:-1]) for name, _, *cells in class_rows(look, formats)]
    return "\n".join([*align(rows, frozenset({0})), *textwrap.wrap(CLASS_NOTES, WIDTH)])


def class_rows(look: Mapping[str, Any], formats: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """A row of cells under CLASS_HEAD for each class of tensors."""
    second = look["classes_for_weights"]
    for name, found in look["classes"].items():
        shares = (percent(found["underflow"]), percent(found["saturation"]))
        again = percent(second[name]["error"]) if name in second else ""
        errors = (percent(found["error"]), percent(found["row_error"]), percent(found["worst_row"]), again)
        yield name, formats[name], *errors, *shares, f"{found['binades']:.0f}"


def _attribution(result: Result) -> str:
    found = result["attribution"]
    rows: list[tuple[str, ...]] = [("which class hurts", "alone, most hurt", "", "all", "without it, all")]
    every = worst_first(result)
    shown = every[:MOST_HARMFUL]
    groups = [(name, entry) for name, entry in found["entries"].items() if name.startswith("*")]
    for name, entry in [*shown, *groups]:
        rows.append((name, *attribution_cells(entry)))
    together = most_hurt(found["together"])
    rows.append(("together", together[0], percent(together[1]), percent(found["together"]["all"]), ""))
    notes = (
        "Errors of gradients when these alone are quantised: of the weights of the quantised layers that are hurt "
        "most, by which the rows are sorted, and of all parameters; then of all when everything but these is. All else "
        "is FP32, and tokens go to the same experts."
    )
    if len(shown) < len(every):
        notes += f" The other {len(every) - len(shown)} classes hurt less: see --html or --json."
    return "\n".join([*align(rows, frozenset({0, 1})), *textwrap.wrap(notes, WIDTH)])


def attribution_cells(entry: Mapping[str, Any]) -> Sequence[str]:
    """The kind of layer that is hurt most and its error alone, that of all alone, and that of all without it."""
    name, error = most_hurt(entry["alone"])
    return name, percent(error), percent(entry["alone"]["all"]), percent(entry["without"]["all"])


def percent(share: float) -> str:
    """Three digits, or as many as matter."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if value >= 9.995 else f"{value:.2f} %" if value >= 0.005 else "< 0.01 %"


def signed(share: float) -> str:
    return f"{100 * share:+.3f} %"
