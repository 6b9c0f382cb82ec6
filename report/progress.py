"""Progress of a run on standard error: a header, a bar or plain lines, a summary.

Standard output stays free for results (`--json`). On a terminal the bar takes two lines of 80 columns; elsewhere a
plain line is printed every `log.every` steps. One rank alone shows progress.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..configs.sections import LogConfig
from .metrics import StepMetrics
from .text.lines import name_rows
from .text.numbers import format_count, format_duration

REFRESH_SECONDS = 0.1
ETA_WINDOW = 50  # last steps that the ETA is computed from: batch ramps and growing sequences change the pace


class ProgressDisplay:
    """Display of a run from `first_step` (steps already done) to `total_steps`; use as a context manager.

    `console` is standard error by default. `title` is the run's name.
    """

    def __init__(
        self,
        config: LogConfig,
        title: str,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._title = title
        self._total = total_steps
        self._first = first_step
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._pace = Pace(clock)
        self._validation_loss: float | None = None
        self._live: Live | None = None
        self._refreshed = -math.inf

    def __enter__(self) -> ProgressDisplay:
        if self._config.progress and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Refreshed by update() alone: a thread would compete with training for the interpreter.
            # Standard output is not redirected: it would come out on standard error.
            waiting = self._draw(self._first, Text("waiting for the first step", style="dim"))
            self._live = Live(waiting, console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start(refresh=True)
        self._pace.tick(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show_rows(self, heading: str, rows: Mapping[str, str]) -> None:
        """Print names and texts in two columns under a heading: the header before a run, its summary after it."""
        for line in (heading, *name_rows(rows)):
            self._print(line)

    def note(self, text: str) -> None:
        """Show a separate line (a checkpoint was written, a batch grew) above the bar."""
        self._print(text)

    def update(self, metrics: StepMetrics) -> None:
        """Show a finished step."""
        step = metrics.step
        self._pace.tick(step)
        evaluated = metrics.validation_loss is not None
        if evaluated:
            self._validation_loss = metrics.validation_loss
        if not self._config.progress:
            return
        if self._live is None:
            if step % self._config.every == 0 or evaluated or step in (self._first + 1, self._total):
                shown = _values(metrics, metrics.validation_loss)
                if metrics.validation_loss_ema is not None:  # not in the bar, which has no room
                    shown.insert(2, f"val EMA {metrics.validation_loss_ema:.4f}")
                self._print("  ".join([f"step {step}/{self._total}", *shown, f"ETA {self._eta(step)}"]))
        elif evaluated or step >= self._total or self._clock() - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = self._clock()
            shown = _values(metrics, self._validation_loss)
            self._live.update(self._draw(step, Text("  ".join(shown), no_wrap=True, overflow="ellipsis")), refresh=True)

    def _eta(self, step: int) -> str:
        return format_duration(self._pace.seconds_per_step * (self._total - step))

    def _draw(self, step: int, values: Text) -> Group:
        share = step / self._total if self._total else 1.0
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_row(
            Text(self._title, style="bold"),
            f"{step}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=step),
            f"{share:.1%}",
            f"ETA {self._eta(step)}",
        )
        return Group(line, values)

    def _print(self, text: str) -> None:
        # soft_wrap: in a log file a line stays one line, however long
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class Pace:
    """Seconds per step by the clock, evaluations and checkpoints included, over the last steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ticks: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)

    def tick(self, step: int) -> None:
        self._ticks.append((step, self._clock()))

    @property
    def seconds_per_step(self) -> float:
        """Mean over the last steps; NaN before the first step is done."""
        if len(self._ticks) < 2:
            return math.nan
        (first, start), (last, end) = self._ticks[0], self._ticks[-1]
        return (end - start) / (last - first)


def _values(metrics: StepMetrics, validation_loss: float | None) -> list[str]:
    """Values of a step that the bar and the plain line show, in at most 80 columns together."""
    shown = [f"loss {metrics.loss:.4f}"]
    if validation_loss is not None:
        shown.append(f"val {validation_loss:.4f}")
    shown.append(f"{format_count(metrics.tokens_per_second)} tok/s")
    if metrics.mfu is not None:
        shown.append(f"MFU {metrics.mfu:.1%}")
    shown.append(f"mem {metrics.memory_gib:.1f} GiB")
    if metrics.max_vio is not None:
        shown.append(f"MaxVio {metrics.max_vio:.2f}")
    return shown
