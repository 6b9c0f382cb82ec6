"""An audit as a page: curves of the losses and of the gradients' errors, and every table. One file, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..report.pages.curves import Line, curve_style, draw_curves, legend
from ..report.pages.page import draw_page, read_asset
from ..report.text.numbers import count, format_count, plural
from .report import CLASS_HEAD, CLASS_NOTES, attribution_cells, class_rows, percent, signed
from .result import Result, windows, worst_first

SMOOTHED = 50
"""Points of the smooth curves."""
V3_BOUND = 0.25
"""Percent: the relative error of the loss that DeepSeek-V3 reports against BF16 (V3 §3.3)."""


def draw(result: Result) -> str:
    """The page of an audit's result."""
    model, against = result["model"], result["against"]
    title = f"FP8 against {against.upper()}: {model['name']}"
    sections = [_losses(result)] if result["curve"] else []
    if result["looks"]:
        sections += [_gradients(result), _classes(result)]
    if result["attribution"] is not None:
        sections.append(_attribution(result))
    about = f"{format_count(model['parameters'])} parameters, {result['steps']:,} steps of {model['tokens']:,} tokens; "
    about += "both runs from the same weights on the same text."
    about += "".join(f" Here: {change}." for change in model["changes"])
    stopped = ""
    if result["stopped"] is not None:
        stopped = f"<p><b>Stopped after {count(result['steps'], 'step')}:</b> {escape(result['stopped'])}</p>"
    style = curve_style() + read_asset(__package__, "page.css")
    return draw_page(title, "\n".join([f'<p class="soft">{escape(about)}</p>', stopped, *sections]), style)


def _losses(result: Result) -> str:
    against, curve, loss = result["against"], result["curve"], result["loss"]
    smooth = windows(curve, against, SMOOTHED)
    runs = [
        Line("fp8", "fp8", [(point["step"], point["fp8"]) for point in smooth]),
        Line(against, "other", [(point["step"], point[against]) for point in smooth]),
    ]
    errors = [
        Line("each step", "raw", [(step["step"], 100 * step["error"]) for step in curve]),
        Line(f"mean of {_size(curve)}", "fp8", [(point["step"], 100 * point["error"]) for point in smooth]),
    ][len(smooth) == len(curve) :]
    facts = [
        (
            f"mean loss of the last {plural(loss['last'], 'step', count(loss['last'], 'step'))}, fp8",
            f"{loss['fp8']:.4f}",
        ),
        (against, f"{loss[against]:.4f}"),
        ("relative error", signed(loss["error"])),
    ]
    if result["validation"] is not None:
        held_out = result["validation"]
        facts += [
            ("held-out loss, fp8", f"{held_out['fp8']:.4f}"),
            (against, f"{held_out[against]:.4f}"),
            ("relative error", signed(held_out["error"])),
        ]
    facts.append(("unigram entropy", f"{result['model']['unigram_entropy']:.4f}"))
    return f"""<div class="facts">{" ".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)}</div>
<h2>Loss</h2>{legend(runs)}
{draw_curves(runs, "step", "nats a token")}
<h2>Relative error of the loss</h2>
<p class="soft">(fp8 - {against}) / {against}. Shaded: &plusmn;{V3_BOUND} %, what DeepSeek-V3 reports (V3 §3.3).</p>
{legend(errors)}
{draw_curves(errors, "step", "error", " %", V3_BOUND)}
"""


def _gradients(result: Result) -> str:
    looks = result["looks"]
    last = looks[-1]
    lines = [
        Line(f"{name}, all parameters", style, [_error_at(look, name) for look in looks])
        for name, style in (("fp8", "fp8"), ("bf16", "other"))
    ]
    head = ("class of parameters", "error fp8", "error bf16", "cosine fp8", "cosine bf16")
    rows = []
    for name, found in last["gradients"]["fp8"].items():
        floor = last["gradients"]["bf16"][name]
        errors = (percent(found["error"]), percent(floor["error"]))
        rows.append((name, *errors, f"{found['cosine']:.5f}", f"{floor['cosine']:.5f}"))
    moved = last["moved"]
    went = ""
    if any(moved.values()):
        went = f" Of the choices of experts {percent(moved['fp8'])} are others than in FP32"
        went += f", {percent(moved['bf16'])} in bf16."
    return f"""<h2>Gradients at equal weights</h2>
<p class="soft">Of one batch at the weights of the FP8 run, against FP32: ||g - g32|| / ||g32||. What BF16 itself \
misses is the floor.{escape(went)}</p>{legend(lines)}
{draw_curves(lines, "step", "error", " %")}
<p class="soft">After step {last["step"]}:</p>
{_table(head, rows)}
"""


def _classes(result: Result) -> str:
    rows = list(class_rows(result["looks"][-1], result["model"]["formats"]))
    return f"""<h2>Quantisation</h2>
<p class="soft">{escape(CLASS_NOTES)} Binades: powers of two between the least and the largest magnitude.</p>
{_table(("class of tensors", *CLASS_HEAD[1:]), rows, left=2)}
"""


def _attribution(result: Result) -> str:
    found = result["attribution"]
    head = ("class of tensors", "hurts most", "its error", "error of all", "of all without it")
    groups = [(name, entry) for name, entry in found["entries"].items() if "*" in name]
    rows = [(name, *attribution_cells(entry)) for name, entry in worst_first(result)]
    more = [(name, *attribution_cells(entry)) for name, entry in groups]
    together = percent(found["together"]["all"])
    return f"""<h2>Which class hurts</h2>
<p class="soft">Errors of gradients when one class alone is quantised: of the weights of the quantised layers that it \
hurts most, and of all parameters; then of all when everything but this class is. With everything, it is {together}. \
All else is FP32, and tokens go to the same experts.</p>
{_table(head, rows, left=2)}
<h2>Roles and kinds</h2>
{_table(head, more, left=2)}
"""


def _error_at(look: Mapping[str, Any], run: str) -> tuple[float, float]:
    return look["step"], 100 * look["gradients"][run]["all"]["error"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=left' if index < left else ''}>{escape(cell)}</{tag}>" for index, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{cells("th", head)}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _size(curve: Sequence[Any]) -> str:
    size = max(1, -(-len(curve) // SMOOTHED))
    return count(size, "step")
