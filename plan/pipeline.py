"""Pipeline of a configuration: its schedule, and the layers of each stage.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

from math import inf

from ..configs.config import Config
from ..parallel.schedule.actions import Schedule
from ..parallel.schedule.check import check
from ..parallel.schedule.choose import example, generate
from ..parallel.schedule.limit_deferred import forwards_in_flight, limit_deferred
from ..parallel.stages import Split, balance
from .costs import costs_of_layers
from .memory import held_by_stage


def make_schedule(config: Config, num_microbatches: int) -> Schedule:
    """Return the configured schedule for a step of `num_microbatches`, with its deferred W limited, checked.

    Raises UsageError where the schedule does not work with the number.
    """
    parallel = config.parallel
    schedule = generate(parallel.schedule, parallel.pp, num_microbatches, parallel.schedule_options)
    check(schedule)
    return _with_limit(config, schedule)


def _with_limit(config: Config, schedule: Schedule) -> Schedule:
    """The schedule with no more deferred W than `memory.deferred_weights` allows."""
    asked = config.memory.deferred_weights
    if asked is None or all(part.kind != "W" for _, _, part in schedule.work()):
        return schedule
    if asked != "auto":
        return limit_deferred(schedule, [0.0] * schedule.num_stages, inf, most=asked)
    held = held_by_stage(config, make_split(config))
    ratios = [stage.weights / stage.forward for stage in held]
    # With few micro-batches a rank never reaches the forwards in flight that its memory must hold for the full batch.
    budget = max(forwards_in_flight(schedule), forwards_in_flight(example_schedule(config)))
    # With full recompute a forward in flight holds next to nothing, and no W would fit beside the others.
    least = budget // 4 if config.memory.recompute == "full" else 1
    return limit_deferred(schedule, ratios, budget, least)


def example_schedule(config: Config) -> Schedule:
    """The configured schedule for a few micro-batches; its stages are those of any number."""
    parallel = config.parallel
    return example(parallel.schedule, parallel.pp, parallel.schedule_options)


def make_split(config: Config) -> Split:
    """The layers of each stage, as `parallel.split` says. Raises UsageError where they do not fit the stages."""
    schedule, layers = example_schedule(config), config.model.num_hidden_layers
    if config.parallel.split != "balanced":
        return Split.of_sizes(config.parallel.split, layers, schedule.num_stages)
    before, each, behind = costs_of_layers(config)
    costs = [layer.total for layer in each]
    return balance(costs, before.total, behind.total, schedule.num_stages, schedule.stages_of_rank)
