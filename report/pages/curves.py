"""Curves as inline SVG: lines over a common axis, with round ticks, in the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .page import read_asset

WIDTH, HEIGHT = 860, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 26, 36


@dataclass(frozen=True)
class Line:
    """A curve. `style` is its class in the page's style sheet."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    in_legend: bool = True


@dataclass(frozen=True)
class Axis:
    """A range of values, and its start and end in the picture."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        """Round values inside the range, about `number` of them."""
        rough = (self.high - self.low) / number
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def draw_curves(lines: Sequence[Line], across: str, up: str, unit: str = "", band: float | None = None) -> str:
    """Picture of `lines` as SVG; the range from -`band` to `band` is shaded. `across` and `up` name the axes."""
    x, y = _axes(lines, band)
    title = f"{up} over {across}: {', '.join(line.name for line in lines)}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    if band is not None:
        top, height = y.at(band), y.at(-band) - y.at(band)
        box = f'x="{LEFT}" y="{top:.1f}" width="{x.end - x.start}" height="{height:.1f}"'
        parts.append(f'<rect class="band" {box}/>')
    for tick in y.ticks(8):
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(tick):.1f}H{x.end}"/>')
        parts.append(_text(LEFT - 8, y.at(tick) + 4, _number(tick) + unit, "end"))
    parts += [_text(x.at(tick), HEIGHT - BOTTOM + 18, _number(tick), "middle") for tick in x.ticks(10)]
    parts += [_text(x.end, HEIGHT - 4, across, "end"), _text(LEFT - 56, 12, up, "start")]
    for line in lines:
        path = "L".join(f"{x.at(step):.1f} {_inside(y.at(value)):.1f}" for step, value in line.points)
        parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if len(line.points) < 30:
            parts += [
                f'<circle class="dot {line.style}" cx="{x.at(step):.1f}" cy="{_inside(y.at(value)):.1f}" r="3">'
                f"<title>{escape(line.name)}, {escape(across)} {_number(step)}: {value:.4g}{unit}</title></circle>"
                for step, value in line.points
            ]
    return "\n".join([*parts, "</svg>"])


def curve_style() -> str:
    """Style sheet of pages with curves; the page adds the colour of each line's `style`."""
    return read_asset(__package__, "curves.css")


def legend(lines: Sequence[Line]) -> str:
    """Legend of the colours."""
    items = (f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines if line.in_legend)
    return f'<div class="legend">{"".join(items)}</div>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(lines: Sequence[Line], band: float | None) -> tuple[Axis, Axis]:
    steps = [step for line in lines for step, _ in line.points]
    # The outermost hundredth of values may leave the picture: a first step, or a spike, would flatten the rest.
    values = sorted(value for line in lines for _, value in line.points)
    cut = len(values) // 100
    low, high = values[cut], values[-1 - cut]
    if band is not None:
        low, high = min(low, -1.2 * band), max(high, 1.2 * band)
    room = 0.04 * (high - low) or 0.5
    right = max(*steps, min(steps) + 1)
    return Axis(0, right, LEFT, WIDTH - RIGHT), Axis(low - room, high + room, HEIGHT - BOTTOM, TOP)


def _inside(y: float) -> float:
    return min(max(y, TOP), HEIGHT - BOTTOM)


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
