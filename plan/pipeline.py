"""Pipeline of a configuration: its schedule, and the layers of each stage.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

from ..configs.config import Config
from ..parallel.schedule.actions import Schedule
from ..parallel.schedule.check import check
from ..parallel.schedule.choose import example, generate
from ..parallel.stages import Split, balance
from .costs import costs_of_layers


def make_schedule(config: Config, num_microbatches: int) -> Schedule:
    """Return the configured schedule for a step of `num_microbatches`, checked.

    Raises UsageError where the schedule does not work with the number.
    """
    parallel = config.parallel
    schedule = generate(parallel.schedule, parallel.pp, num_microbatches, parallel.schedule_options)
    check(schedule)
    return schedule


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
