"""Text of `counterflow audit` for a person, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from ..report.text.lines import WIDTH
from ..report.text.numbers import count, format_count
from ..report.text.table import align
from .case import AuditCase
from .result import Attribution, Entry, Look, MeanLoss, Result, most_hurt

MOST_HARMFUL = 12
"""Classes of tensors that are listed; the page and --json have all."""

CLASS_HEAD = ("quantised", "format", "error", "by row", "worst", "for W", "underflow", "saturated", "binades")
CLASS_NOTES = (
    "Error is ||q - x|| / ||x||; by row that of each row alone, a token's or a weight's (root mean square, and the "
    "worst); for W that of the same tensors where they are quantised along the other dimension (of inputs, once more). "
    "Underflow: share of what is not zero that became zero. Saturated: share that became the format's largest in its "
    "tile."
)


def heading(case: AuditCase) -> str:
    """Size of the audit, its runs and its folder."""
    batch = case.config.batch
    tokens = batch.sequence_length * batch.global_sequences
    size = f"{format_count(case.parameters)} parameters, {case.steps:,} steps of {tokens:,} tokens"
    lines = [f"{case.config.run.name}: {size}, fp8 against {case.against}"]
    lines += [f"here: {change}" for change in case.changes]
    return "\n".join([*lines, f"records: {case.folder}"])


def progress_heading(against: str) -> str:
    return f"\n{'step':>7}  {'loss fp8':>8}  {'loss ' + against:>9}  {'error':>8}"


def progress_line(step: int, loss: MeanLoss) -> str:
    """Mean losses of the steps since the line before, up to `step`."""
    return f"{step:>7}  {loss.fp8:>8.4f}  {loss.other:>9.4f}  {signed(loss.error):>8}"


def report(result: Result) -> str:
    """Everything but the curve, which was printed step by step."""
    parts = [_losses(result)]
    if result.looks:
        look = result.looks[-1]
        parts += [_gradients(look), _classes(look, result.model.formats)]
    if result.attribution is not None:
        parts.append(_attribution(result.attribution))
    return "\n\n".join(parts)


def _losses(result: Result) -> str:
    rows = []
    if result.stopped is not None:
        rows += textwrap.wrap(f"stopped after {count(result.steps, 'step')}: {result.stopped}", WIDTH)
    if result.loss is not None:
        last = "step" if result.loss.last == 1 else f"{result.loss.last} steps"
        rows.append(_loss_row(f"mean loss, last {last}", result.loss, result.against))
    if result.validation is not None:
        rows.append(_loss_row("held-out text", result.validation, result.against))
    rows.append(f"unigram entropy of the held-out text: {result.model.unigram_entropy:.4f} nats")
    return "\n".join(rows)


def _loss_row(name: str, loss: MeanLoss, against: str) -> str:
    return f"{name}: fp8 {loss.fp8:.4f}, {against} {loss.other:.4f}, error {signed(loss.error)}"


def _gradients(look: Look) -> str:
    rows: list[tuple[str, ...]] = [("gradients of", "error fp8", "bf16", "cosine fp8", "bf16")]
    for name, fp8 in look.gradients.fp8.items():
        bf16 = look.gradients.bf16[name]
        rows.append((name, percent(fp8.error), percent(bf16.error), f"{fp8.cosine:.5f}", f"{bf16.cosine:.5f}"))
    notes = f"At the weights of the fp8 run after step {look.step}, against FP32. Error is ||g - g32|| / ||g32||."
    if look.moved.fp8 or look.moved.bf16:
        notes += f" Of the choices of experts {percent(look.moved.fp8)} moved, and {percent(look.moved.bf16)} in bf16."
    return "\n".join([*align(rows, frozenset({0})), *textwrap.wrap(notes, WIDTH)])


def _classes(look: Look, formats: Mapping[str, str]) -> str:
    rows: list[tuple[str, ...]] = [(CLASS_HEAD[0], *CLASS_HEAD[2:-1])]
    rows += [(name, *cells[:-1]) for name, _, *cells in class_rows(look, formats)]
    return "\n".join([*align(rows, frozenset({0})), *textwrap.wrap(CLASS_NOTES, WIDTH)])


def class_rows(look: Look, formats: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """A row of cells under CLASS_HEAD for each class of tensors."""
    for name, found in look.classes.items():
        second = look.classes_for_weights.get(name)
        for_weights = percent(second.error) if second is not None else ""
        errors = (percent(found.error), percent(found.row_error), percent(found.worst_row), for_weights)
        yield name, formats[name], *errors, percent(found.underflow), percent(found.saturation), f"{found.binades:.0f}"


def _attribution(attribution: Attribution) -> str:
    rows: list[tuple[str, ...]] = [("which class hurts", "alone, most hurt", "", "all", "without it, all")]
    classes = attribution.worst_first()
    shown = classes[:MOST_HARMFUL]
    roles = [(name, entry) for name, entry in attribution.entries.items() if name.startswith("*")]
    rows += [(name, *attribution_cells(entry)) for name, entry in [*shown, *roles]]
    kind, error = most_hurt(attribution.together)
    rows.append(("together", kind, percent(error), percent(attribution.together["all"]), ""))
    notes = (
        "Errors of gradients when these alone are quantised: of the weights of the quantised layers that are hurt "
        "most, by which the rows are sorted, and of all parameters; then of all when everything but these is. All else "
        "is FP32, and tokens go to the same experts."
    )
    if len(shown) < len(classes):
        notes += f" The other {len(classes) - len(shown)} classes hurt less: see --html or --json."
    return "\n".join([*align(rows, frozenset({0, 1})), *textwrap.wrap(notes, WIDTH)])


def attribution_cells(entry: Entry) -> Sequence[str]:
    """Cells of an entry: the kind of layer that is hurt most, its error, and the errors of all, alone and without."""
    kind, error = most_hurt(entry.alone)
    return kind, percent(error), percent(entry.alone["all"]), percent(entry.without["all"])


def percent(share: float) -> str:
    """Percents with three digits, or with as many as matter."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if value >= 9.995 else f"{value:.2f} %" if value >= 0.005 else "< 0.01 %"


def signed(share: float) -> str:
    return f"{100 * share:+.3f} %"
