"""Steps to simulate: a configuration's pipeline, or a pipeline given in numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..configs.config import Config
from ..parallel.layout import Layout
from ..parallel.schedule.catalogue import find_schedule, schedule_names
from ..parallel.schedule.check import check
from ..parallel.schedule.choose import AUTO, generate, schedule_name
from ..parallel.schedule.costs import Costs
from ..parallel.schedule.simulate import simulate
from ..parallel.schedule.timeline import Timeline
from ..settings import UsageError
from .costs import PAIR_RATIO, stage_costs, stage_work
from .pipeline import make_schedule, make_split


@dataclass(frozen=True)
class Case(ABC):
    """A step to simulate, with its own schedule or with others."""

    num_ranks: int
    num_microbatches: int

    @property
    @abstractmethod
    def unit(self) -> str:
        """Unit of the times in the result of `simulate`; empty where they are in the user's own."""

    @abstractmethod
    def simulate(self, name: str | None = None) -> Timeline:
        """Simulate the step with its own schedule, or with the schedule `name` of `names()` on the same model.

        The case's schedule options count for its own schedule only.
        Raises UsageError where the schedule does not work with the numbers.
        """

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The schedules to compare."""

    def compare(self) -> dict[str, Timeline | str]:
        """Simulate the step with every schedule of `names()`; for a schedule that refuses, its reason."""
        outcomes: dict[str, Timeline | str] = {}
        for name in self.names():
            try:
                outcomes[name] = self.simulate(name)
            except UsageError as error:
                outcomes[name] = str(error)
        return outcomes

    def to_json(self, timeline: Timeline) -> dict[str, Any]:
        """The timeline's figures: in TFLOP where costs are predicted, else in the unit of the given costs."""
        return timeline.to_json()


@dataclass(frozen=True)
class NumbersCase(Case):
    """Pipeline with the same costs on every stage, in any one unit of time.

    Raises UsageError for an unknown schedule, for costs that are all 0 and for an impossible pair.
    """

    schedule: str
    options: Mapping[str, Any]
    forward: float
    backward_input: float
    backward_weight: float
    overlapped: float | None
    """Length of an overlapped pair; None for an assumption."""
    p2p: float
    """Length of a transfer between ranks."""

    def __post_init__(self) -> None:
        if not self.forward + self.backward_input + self.backward_weight:
            raise UsageError("forward, backward_input and backward_weight are all 0: nothing would take any time")
        longer = self.longer_half
        if self.overlapped is not None and self.overlapped < longer * (1 - 1e-9):
            half = "F" if self.forward == longer else "I + W"
            raise UsageError(
                f"overlapped {self.overlapped:g} is less than the longer of its halves, {half} = {longer:g}: "
                f"at least {longer:g}"
            )
        # A comparison shows what a schedule refuses, so a name that does not exist is refused here.
        find_schedule(schedule_name(self.schedule, self.num_ranks))

    @property
    def unit(self) -> str:
        return ""

    @property
    def longer_half(self) -> float:
        """The longer of a pair's forward and backward."""
        return max(self.forward, self.backward_input + self.backward_weight)

    @property
    def pair(self) -> float:
        """Length of an overlapped pair, given or assumed."""
        parts = self.forward + self.backward_input + self.backward_weight
        return max(PAIR_RATIO * parts, self.longer_half) if self.overlapped is None else self.overlapped

    def simulate(self, name: str | None = None) -> Timeline:
        chosen, options = (self.schedule, self.options) if name in (None, self.schedule) else (name, {})
        schedule = generate(chosen, self.num_ranks, self.num_microbatches, options)
        check(schedule)
        # A comparison is of one model, so a schedule with more stages than ranks has smaller stages.
        share = 1.0 if name is None else self.num_ranks / schedule.num_stages
        costs = Costs.uniform(
            schedule.num_stages,
            self.forward * share,
            self.backward_input * share,
            self.backward_weight * share,
            self.pair * share,
            self.p2p,
        )
        return simulate(schedule, costs)

    def names(self) -> tuple[str, ...]:
        shipped = schedule_names()
        return shipped if self.schedule in (*shipped, AUTO) else (*shipped, self.schedule)


@dataclass(frozen=True)
class ConfigCase(Case):
    """Pipeline of a configuration. Raises UsageError for an impossible pair ratio."""

    config: Config
    pair_ratio: float | None
    """Length of an overlapped pair over that of its parts; None for `PAIR_RATIO`."""
    p2p: float
    """Length of a transfer between ranks, in the unit of `part_costs`."""
    assumed_dp: int | None
    """Value taken for `parallel.dp` where it is auto and matters."""

    def __post_init__(self) -> None:
        if self.pair_ratio is not None:
            _refuse_impossible_ratio(self.pair_ratio, self.config)

    @property
    def unit(self) -> str:
        """Unit that makes a stage's cost a number of a usual size."""
        return self._scale()[0]

    @property
    def predicted(self) -> bool:
        """Whether costs are predicted rather than given by `parallel.stage_costs`."""
        return self.config.parallel.stage_costs is None

    @property
    def ratio(self) -> float:
        """Length of an overlapped pair over that of its parts, given or assumed."""
        return PAIR_RATIO if self.pair_ratio is None else self.pair_ratio

    @property
    def transfer(self) -> float:
        """Length of a transfer between ranks, in `unit`."""
        return self.p2p * self._scale()[1]

    def simulate(self, name: str | None = None) -> Timeline:
        config = self.config
        if name is not None and name != self._name:
            parallel = config.parallel.model_copy(update={"schedule": name, "schedule_options": {}})
            config = config.model_copy(update={"parallel": parallel})
        schedule = make_schedule(config, self.num_microbatches)
        return simulate(schedule, _scaled(self._costs(config), self._scale()[1]))

    def names(self) -> tuple[str, ...]:
        shipped = schedule_names()
        return shipped if self._name in shipped else (*shipped, self._name)

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
        return stage_costs(config, make_split(config), self.ratio, self.p2p)

    def _scale(self) -> tuple[str, float]:
        if not self.predicted:
            return "", 1.0
        largest = max(self._costs(self.config).forward)
        for unit, factor in (("TFLOP", 1.0), ("GFLOP", 1e3)):
            if largest * factor >= 0.1:
                return unit, factor
        return "MFLOP", 1e6


def case_from_config(
    config: Config, num_microbatches: int | None = None, pair_ratio: float | None = None, p2p: float = 0.0
) -> ConfigCase:
    """Return the case of a configuration, with the micro-batches of its full batch where no number is given."""
    parallel, assumed = config.parallel, None
    if num_microbatches is None:
        dp = parallel.dp
        if dp == "auto":
            dp = assumed = parallel.ep
        per_node = 8 if parallel.gpus_per_node == "auto" else parallel.gpus_per_node
        layout = Layout.resolve(parallel.pp * dp, parallel.pp, parallel.ep, dp, per_node)
        num_microbatches = config.batch.microbatches(config.batch.global_sequences, layout.dp)
    return ConfigCase(parallel.pp, num_microbatches, config, pair_ratio, p2p, assumed)


def _refuse_impossible_ratio(ratio: float, config: Config) -> None:
    """Refuse a ratio that no step of this model can reach. In a pair of unlike stages one half may still be longer."""
    work = stage_work(config, make_split(config))
    forward, whole = sum(stage.forward for stage in work), sum(stage.total for stage in work)
    share = max(forward, whole - forward) / whole
    if ratio < share * (1 - 1e-9):
        least = math.ceil(share * 1000 - 1e-6) / 1000
        half = "forward" if 2 * forward >= whole else "backward"
        raise UsageError(
            f"pair ratio {ratio:g} is less than the longer half of a pair, as the {half} is {share:.3g} of this "
            f"model's work: at least {least:g}"
        )


def _scaled(costs: Costs, factor: float) -> Costs:
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
