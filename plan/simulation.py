"""What `counterflow simulate` simulates: a configuration's pipeline, or one that the command line gives in numbers."""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..configs.config import Config
from ..configs.located_yaml import Fault, Location, parse_yaml
from ..parallel.layout import Layout
from ..parallel.schedule.catalogue import find_schedule, schedule_names
from ..parallel.schedule.check import check
from ..parallel.schedule.choose import AUTO, generate, schedule_name
from ..parallel.schedule.costs import Costs
from ..parallel.schedule.simulate import simulate
from ..parallel.schedule.timeline import Timeline
from ..settings import UsageError
from .pipeline import PAIR_RATIO, describe_split, make_schedule, make_split, microbatches, stage_costs, stage_work


@dataclass(frozen=True)
class Case(ABC):
    """One step to simulate, with its own schedule or with others."""

    num_ranks: int
    num_microbatches: int

    @property
    @abstractmethod
    def unit(self) -> str:
        """Of the times in what `simulate` returns; empty where they are in the user's own."""

    @abstractmethod
    def simulate(self, name: str | None = None) -> Timeline:
        """The step with its own schedule; or with the schedule `name` of `names()` on the same model, to compare.

        Options are for its own alone.

        Raises UsageError where the schedule cannot serve the numbers.
        """

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The schedules to compare."""

    @abstractmethod
    def assumptions(self) -> list[str]:
        """Sentences on where the numbers come from."""

    def split(self) -> str | None:
        """The table of stages, where there are layers."""
        return None

    def to_json(self, timeline: Timeline) -> dict[str, Any]:
        """The timeline's figures, in the unit that the command's help states."""
        return timeline.to_json()


@dataclass(frozen=True)
class NumbersCase(Case):
    """The same costs on every stage."""

    schedule: str
    options: dict[str, Any]
    forward: float
    backward_input: float
    backward_weight: float
    overlapped: float | None
    p2p: float

    @property
    def unit(self) -> str:
        return ""

    def simulate(self, name: str | None = None) -> Timeline:
        chosen, options = (self.schedule, self.options) if name in (None, self.schedule) else (name, {})
        schedule = generate(chosen, self.num_ranks, self.num_microbatches, options)
        check(schedule)
        # To compare, the model is fixed: where a rank holds more than its one share of it, the stages are smaller.
        share = 1.0 if name is None else self.num_ranks / schedule.num_stages
        costs = Costs.uniform(
            schedule.num_stages,
            self.forward * share,
            self.backward_input * share,
            self.backward_weight * share,
            self._pair * share,
            self.p2p,
        )
        return simulate(schedule, costs)

    def names(self) -> tuple[str, ...]:
        shipped = schedule_names()
        return shipped if self.schedule in (*shipped, AUTO) else (*shipped, self.schedule)

    def assumptions(self) -> list[str]:
        costs = f"F {self.forward:g}, I {self.backward_input:g}, W {self.backward_weight:g}, pair {self._pair:.4g}"
        by = "2.5/3 of its parts" if self._pair > self._longer_half else "as long as its longer half"
        assumed = "" if self.overlapped is not None else f" (assumed: {by})"
        p2p = f", transfer {self.p2p:g}" if self.p2p else ""
        return [f"{costs}{assumed}{p2p}"]

    @property
    def _pair(self) -> float:
        parts = self.forward + self.backward_input + self.backward_weight
        return max(PAIR_RATIO * parts, self._longer_half) if self.overlapped is None else self.overlapped

    @property
    def _longer_half(self) -> float:
        return max(self.forward, self.backward_input + self.backward_weight)


@dataclass(frozen=True)
class ConfigCase(Case):
    """A configuration's stages."""

    config: Config
    pair_ratio: float | None
    p2p: float
    assumed_dp: int | None
    """What stands for `parallel.dp` where that is auto and counts."""

    @property
    def unit(self) -> str:
        """Times are scaled to whichever unit makes a stage's cost a number of a usual size."""
        return self._scale()[0]

    def simulate(self, name: str | None = None) -> Timeline:
        config = self.config
        if name is not None and name != self._name:
            parallel = config.parallel.model_copy(update={"schedule": name, "schedule_options": {}})
            config = config.model_copy(update={"parallel": parallel})
        schedule = make_schedule(config, self.num_microbatches)
        return simulate(schedule, _times(self._costs(config), self._scale()[1]))

    def names(self) -> tuple[str, ...]:
        shipped = schedule_names()
        return shipped if self._name in shipped else (*shipped, self._name)

    def assumptions(self) -> list[str]:
        ratio = PAIR_RATIO if self.pair_ratio is None else self.pair_ratio
        predicted = self.config.parallel.stage_costs is None
        where = f"{self.unit}, predicted" if predicted else "parallel.stage_costs"
        said = " (assumed)" if self.pair_ratio is None else ""
        p2p = f", a transfer {self.p2p * self._scale()[1]:.4g}" if self.p2p else ""
        lines = [f"{where}; a pair takes {ratio:.3g} of its parts' time{said}{p2p}"]
        if self.assumed_dp is not None:
            lines.append(f"parallel.dp is auto, taken as {self.assumed_dp}: more leaves fewer micro-batches")
        return lines

    def split(self) -> str | None:
        return describe_split(self.config)

    def to_json(self, timeline: Timeline) -> dict[str, Any]:
        factor = self._scale()[1]
        figures = timeline.to_json()
        figures["step_time"] /= factor
        figures["bubble"] = [time / factor for time in figures["bubble"]]
        return figures

    @property
    def _name(self) -> str:
        return schedule_name(self.config.parallel.schedule, self.config.parallel.pp)

    def _costs(self, config: Config) -> Costs:
        return stage_costs(config, PAIR_RATIO if self.pair_ratio is None else self.pair_ratio, self.p2p)

    def _scale(self) -> tuple[str, float]:
        if self.config.parallel.stage_costs is not None:
            return "", 1.0
        largest = max(self._costs(self.config).forward)
        for unit, factor in (("TFLOP", 1.0), ("GFLOP", 1e3)):
            if largest * factor >= 0.1:
                return unit, factor
        return "MFLOP", 1e6


def case_from_numbers(args: argparse.Namespace) -> NumbersCase:
    """The case that the arguments alone describe."""
    given = args.forward, args.backward_input, args.backward_weight
    forward, backward_input, backward_weight = (1.0 if cost is None else cost for cost in given)
    if not forward + backward_input + backward_weight:
        raise UsageError("--forward, --backward-input and --backward-weight are all 0: nothing would take any time")
    if args.overlapped is not None:
        _refuse_impossible_pair(args.overlapped, forward, backward_input + backward_weight)
    options = _options(args.option or ())
    schedule = AUTO if args.schedule is None else args.schedule
    find_schedule(schedule_name(schedule, args.ranks))  # a comparison shows refusals, not names that do not exist
    return NumbersCase(
        num_ranks=args.ranks,
        num_microbatches=args.microbatches,
        schedule=schedule,
        options=options,
        forward=forward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        overlapped=args.overlapped,
        p2p=args.p2p,
    )


def case_from_config(config: Config, args: argparse.Namespace) -> ConfigCase:
    """The case of a configuration at its full batch."""
    if args.pair_ratio is not None:
        _refuse_impossible_ratio(args.pair_ratio, config)
    parallel, assumed = config.parallel, None
    count = args.microbatches
    if count is None:
        dp = parallel.dp
        if dp == "auto":
            dp = assumed = parallel.ep
        per_node = 8 if parallel.gpus_per_node == "auto" else parallel.gpus_per_node
        layout = Layout.resolve(parallel.pp * dp, parallel.pp, parallel.ep, dp, per_node)
        count = microbatches(config, layout, config.batch.global_sequences)
    return ConfigCase(parallel.pp, count, config, args.pair_ratio, args.p2p, assumed)


def _refuse_impossible_pair(overlapped: float, forward: float, backward: float) -> None:
    longer = max(forward, backward)
    if overlapped < longer * (1 - 1e-9):
        half = "F" if forward >= backward else "I + W"
        raise UsageError(
            f"--overlapped {overlapped:g} is less than the longer of its halves, {half} = {longer:g}: "
            f"at least {longer:g}"
        )


def _refuse_impossible_ratio(ratio: float, config: Config) -> None:
    """Refuse what no step of this model can reach. A single pair of unlike stages may still be held up by one half."""
    work = stage_work(config, make_split(config))
    forward, whole = sum(stage.forward for stage in work), sum(stage.total for stage in work)
    share = max(forward, whole - forward) / whole
    if ratio < share * (1 - 1e-9):
        least = math.ceil(share * 1000 - 1e-6) / 1000
        half = "forward" if 2 * forward >= whole else "backward"
        raise UsageError(
            f"--pair-ratio {ratio:g} is less than the longer half of a pair, as the {half} is {share:.3g} of this "
            f"model's work: at least {least:g}"
        )


def _options(given: Sequence[str]) -> dict[str, Any]:
    """`--option KEY=VALUE`, each value a YAML scalar."""
    options: dict[str, Any] = {}
    for option in given:
        name, equals, text = option.partition("=")
        faults: list[Fault] = []
        value = parse_yaml(text, Location(f"--option {option}", level=-1), faults)
        if not equals or not name or faults or value is None or isinstance(value.value, list | dict | None):
            raise UsageError(f"--option {option}: expects KEY=VALUE, such as stages_per_rank=4")
        options[name] = value.value
    return options


def _times(costs: Costs, factor: float) -> Costs:
    def scaled(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value * factor for value in values)

    return replace(
        costs,
        forward=scaled(costs.forward),
        backward_input=scaled(costs.backward_input),
        backward_weight=scaled(costs.backward_weight),
        hidden=scaled(costs.hidden),
        p2p_latency=costs.p2p_latency * factor,
    )
