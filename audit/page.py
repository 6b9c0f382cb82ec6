"""An audit as a page: curves of the losses and of the gradients' errors, and every table. One file, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

from ..report.pages.curves import Line, curve_style, draw_curves, legend
from ..report.pages.page import draw_page, read_asset
from ..report.text.numbers import count, format_count, plural
from .report import CLASS_HEAD, CLASS_NOTES, attribution_cells, class_rows, percent, signed
from .result import Attribution, AuditedModel, Look, MeanLoss, Result, windows

SMOOTHED = 50
"""Points of a smooth curve."""
V3_BOUND = 0.25
"""Relative error of the loss that DeepSeek-V3 reports against BF16, in percent (V3 §3.3)."""


def draw(result: Result) -> str:
    """The page of an audit's result."""
    model = result.model
    title = f"FP8 against {result.against.upper()}: {model.name}"
    sections = [_losses(result)] if result.curve else []
    if result.looks:
        sections += [_gradients(result.looks), _classes(result.looks[-1], model)]
    if result.attribution is not None:
        sections.append(_attribution(result.attribution))
    about = f"{format_count(model.parameters)} parameters, {result.steps:,} steps of {model.tokens:,} tokens; "
    about += "both runs from the same weights on the same text."
    about += "".join(f" Here: {change}." for change in model.changes)
    stopped = ""
    if result.stopped is not None:
        stopped = f"<p><b>Stopped after {count(result.steps, 'step')}:</b> {escape(result.stopped)}</p>"
    style = curve_style() + read_asset(__package__, "page.css")
    return draw_page(title, "\n".join([f'<p class="soft">{escape(about)}</p>', stopped, *sections]), style)


def _losses(result: Result) -> str:
    against, curve = result.against, result.curve
    smooth = windows(curve, SMOOTHED)
    runs = [
        Line("fp8", "fp8", [(point.step, point.fp8) for point in smooth]),
        Line(against, "other", [(point.step, point.other) for point in smooth]),
    ]
    mean = f"mean of {count(max(1, -(-len(curve) // SMOOTHED)), 'step')}"
    errors = [Line(mean, "fp8", [(point.step, 100 * point.error) for point in smooth])]
    if len(smooth) < len(curve):
        errors.insert(0, Line("each step", "raw", [(step.step, 100 * step.error) for step in curve]))
    facts = []
    if result.loss is not None:
        last = plural(result.loss.last, "step", count(result.loss.last, "step"))
        facts += _loss_facts(f"mean loss of the last {last}", result.loss, against)
    if result.validation is not None:
        facts += _loss_facts("held-out loss", result.validation, against)
    facts.append(("unigram entropy", f"{result.model.unigram_entropy:.4f}"))
    return f"""<div class="facts">{" ".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)}</div>
<h2>Loss</h2>{legend(runs)}
{draw_curves(runs, "step", "nats per token")}
<h2>Relative error of the loss</h2>
<p class="soft">(fp8 - {against}) / {against}. Shaded: &plusmn;{V3_BOUND} %, what DeepSeek-V3 reports (V3 §3.3).</p>
{legend(errors)}
{draw_curves(errors, "step", "error", " %", V3_BOUND)}
"""


def _loss_facts(name: str, loss: MeanLoss, against: str) -> list[tuple[str, str]]:
    numbers = (f"{loss.fp8:.4f}", f"{loss.other:.4f}", signed(loss.error))
    return list(zip((f"{name}, fp8", against, "relative error"), numbers, strict=True))


def _gradients(looks: Sequence[Look]) -> str:
    last = looks[-1]
    lines = [
        Line("fp8, all parameters", "fp8", [_error_at(look, "fp8") for look in looks]),
        Line("bf16, all parameters", "other", [_error_at(look, "bf16") for look in looks]),
    ]
    head = ("class of parameters", "error fp8", "error bf16", "cosine fp8", "cosine bf16")
    rows = []
    for name, fp8 in last.gradients.fp8.items():
        bf16 = last.gradients.bf16[name]
        rows.append((name, percent(fp8.error), percent(bf16.error), f"{fp8.cosine:.5f}", f"{bf16.cosine:.5f}"))
    moved = ""
    if last.moved.fp8 or last.moved.bf16:
        moved = f" Of the choices of experts {percent(last.moved.fp8)} are others than in FP32"
        moved += f", {percent(last.moved.bf16)} in bf16."
    return f"""<h2>Gradients at equal weights</h2>
<p class="soft">Of one batch at the weights of the FP8 run, against FP32: ||g - g32|| / ||g32||. The error of BF16 \
itself is the floor.{escape(moved)}</p>{legend(lines)}
{draw_curves(lines, "step", "error", " %")}
<p class="soft">After step {last.step}:</p>
{_table(head, rows)}
"""


def _classes(look: Look, model: AuditedModel) -> str:
    return f"""<h2>Quantisation</h2>
<p class="soft">{escape(CLASS_NOTES)} Binades: powers of two between the least and the largest magnitude.</p>
{_table(("class of tensors", *CLASS_HEAD[1:]), list(class_rows(look, model.formats)), left=2)}
"""


def _attribution(attribution: Attribution) -> str:
    head = ("class of tensors", "hurts most", "its error", "error of all", "of all without it")
    classes = [(name, *attribution_cells(entry)) for name, entry in attribution.worst_first()]
    groups = [(name, *attribution_cells(entry)) for name, entry in attribution.entries.items() if "*" in name]
    together = percent(attribution.together["all"])
    return f"""<h2>Which class hurts</h2>
<p class="soft">Errors of gradients when one class alone is quantised: of the weights of the quantised layers that it \
hurts most, and of all parameters; then of all when everything but this class is. With everything, it is {together}. \
All else is FP32, and tokens go to the same experts.</p>
{_table(head, classes, left=2)}
<h2>Roles and kinds</h2>
{_table(head, groups, left=2)}
"""


def _error_at(look: Look, run: Literal["fp8", "bf16"]) -> tuple[float, float]:
    deviations = look.gradients.fp8 if run == "fp8" else look.gradients.bf16
    return look.step, 100 * deviations["all"].error


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=left' if index < left else ''}>{escape(cell)}</{tag}>" for index, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{cells("th", head)}</tr></thead>\n<tbody>{body}</tbody></table></div>'
