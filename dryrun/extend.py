"""Long steps from two short ones: beyond some number of micro-batches a step only repeats its steady state.

A schedule's steady state repeats after 2 P micro-batches at most, on P pipeline ranks, and in a dry run all
micro-batches are alike. Everything that is counted therefore grows by the same amount with every 2 P micro-batches, and
so does the peak, as the step's tokens and losses lie on the device. Two short steps give the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ..comm.meter import Tally, Traffic
from ..configs.config import Config
from ..parallel.schedule.check import check
from ..plan.pipeline import make_schedule
from ..settings import UsageError
from .recorder import Work
from .result import DryRun


def fewest_microbatches(config: Config, microbatches: int) -> int:
    """Fewest micro-batches of a step with the steady state and the peak of memory of a step of `microbatches`.

    As many micro-batches as in the long step have activations at the same time on every rank, and the steady state
    repeats.
    """
    period = 2 * config.parallel.pp
    most = check(make_schedule(config, microbatches)).peak
    for fewer in range(microbatches % period or period, microbatches - period, period):
        try:
            held = check(make_schedule(config, fewer)).peak
        except UsageError:
            continue
        if held == most:
            return fewer + period
    return microbatches


def extend(short: DryRun, longer: DryRun, microbatches: int) -> DryRun:
    """The dry run of `microbatches`, from two of fewer.

    Actions and collectives are listed as they are in the longer of the two.
    """
    line = _Line(short.microbatches, longer.microbatches, microbatches)
    work = {label: line.work(short.work.get(label, Work()), each) for label, each in longer.work.items()}
    traffic = {name: line.traffic(short.traffic.get(name, {}), each) for name, each in longer.traffic.items()}
    seconds = {name: short.seconds[name] + spent for name, spent in longer.seconds.items()}
    return replace(
        longer,
        microbatches=microbatches,
        run_microbatches=longer.microbatches,
        peak_bytes=line.at(short.peak_bytes, longer.peak_bytes),
        work=work,
        traffic=traffic,
        seconds=seconds,
    )


class _Line:
    """Straight line through numbers at two sizes of a step, read off at a third."""

    def __init__(self, short: int, longer: int, wanted: int) -> None:
        assert short < longer <= wanted, (short, longer, wanted)
        self._step, self._left = longer - short, wanted - longer

    def at(self, short: int, longer: int) -> int:
        return longer + (longer - short) * self._left // self._step

    def counts(self, short: Mapping[str, int], longer: Mapping[str, int]) -> Counter[str]:
        return Counter({name: self.at(short.get(name, 0), number) for name, number in longer.items()})

    def work(self, short: Work, longer: Work) -> Work:
        return Work(
            self.counts(short.kernels, longer.kernels),
            self.counts(short.bytes, longer.bytes),
            longer.flops + (longer.flops - short.flops) * self._left / self._step,
            self.counts(short.waits, longer.waits),
        )

    def traffic(self, short: Traffic, longer: Traffic) -> Traffic:
        made: Traffic = {}
        for kind, tally in longer.items():
            before = short.get(kind, Tally())
            made[kind] = Tally(self.at(before.bytes, tally.bytes), self.at(before.messages, tally.messages))
        return made
