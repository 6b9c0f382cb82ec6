"""The verification itself: the grid's steps against the single process's, each from the same state.

Every step of the grid begins with the state that the single process had before that step. So a difference of rounding
is not carried into the next step, and one tolerance serves all steps. AdamW would make the difference large: even for a
gradient near zero, of either sign, it moves a weight by the learning rate. For the same reason updated weights are
compared with those of a single process that steps with the grid's own gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..configs.config import Config
from ..configs.write import plain
from ..parallel.groups import Groups
from ..parallel.layout import Layout
from ..plan.steps import Progress, steps_from
from ..training.build import make_groups
from ..training.dispatch import partial_sums_of
from ..training.trainer import Trainer
from .compare import (
    LOSSES,
    Difference,
    Tolerances,
    compare_biases,
    compare_copies,
    compare_formula,
    compare_gradients,
    compare_numbers,
    compare_state,
    label,
    merge,
    moved_choices,
    tolerances,
)
from .run import ObservedTrainer, RankStep, SingleProcess
from .shrink import Shrunk
from .text import Text, open_text

MOST_SEEDS = 3
"""Number of seeds that are tried before ties are taken for a fault."""


@dataclass
class Attempt:
    """The run of one seed."""

    seed: int
    differences: list[Difference] = field(default_factory=list)
    moved: list[MovedChoices] = field(default_factory=list)
    closest: float = float("inf")
    """Least gap between a routing score that was chosen and one that was not."""
    near_balance: int = 0
    """Choices within rounding that the balance loss counts, in the first step that departs without a moved token."""

    @property
    def tied(self) -> bool:
        """Whether rounding alone can explain the differences, so that another seed has to be tried."""
        return any(moved.tie for moved in self.moved) or self.near_balance > 0

    @property
    def first(self) -> Difference | None:
        """The first difference that is out of bounds."""
        return next((found for found in self.differences if found.departs), None)


@dataclass(frozen=True)
class MovedChoices:
    """Choices of experts that differ from the single process's."""

    step: int
    layer: int
    """Number among all MoE layers."""
    choices: int
    near: int
    """Largest number of choices that rounding can move in this layer."""
    closest: float
    """Least gap of scores in the step."""

    @property
    def tie(self) -> bool:
        return 0 < self.choices <= self.near


@dataclass
class Outcome:
    """Findings in one set of formats."""

    recipe: str
    """The formats, as `label` names them."""
    tolerances: Tolerances
    attempts: list[Attempt]
    microbatches: tuple[int, ...]
    """Micro-batches of each pipeline, by step."""
    origin: str
    """Origin of the text, in words."""

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def agrees(self) -> bool:
        return self.last.first is None and not self.last.moved


def verify_ranks(shrunk: Shrunk, groups: Groups) -> list[Outcome]:
    """Verify in the configured precision, and in the closest one in FP32 to find faults that coarser formats hide.

    Every rank of the grid calls this. Rank 0 gets the outcomes, the other ranks none.
    """
    text = _share(groups, open_text(shrunk.config.data) if groups.rank == 0 else None)
    single = None
    if groups.rank == 0:
        single = make_groups(shrunk.single_process(), Layout(1), "cpu", [dist.get_global_rank(groups.world, 0)])
    outcomes = []
    for changes in _formats(shrunk.config):
        outcomes.append(_verify(_with(shrunk, **changes), groups, single, text))
    return [outcome for outcome in outcomes if outcome is not None]


def _formats(config: Config) -> list[dict[str, dict[str, Any]]]:
    """Changes to the configured formats, by section: none, and those that make them FP32.

    With FP8, everything that is not quantised becomes FP32, and scales become powers of two. With other scales the
    values of a tile affect each other, and the tokens that share a tile depend on the layout.
    """
    precision: dict[str, Any] = {"recipe": "fp32"}
    if config.precision.recipe == "fp8":
        precision = {"high": "fp32", "scales": "pow2", "classes": {}}
    close = {"precision": precision, "optim": {"reduce": "fp32"}}
    same = all(getattr(getattr(config, name), key) == close[name][key] for name in close for key in close[name])
    return [{}] if same else [{}, close]


def _verify(shrunk: Shrunk, groups: Groups, single: Groups | None, text: Text) -> Outcome | None:
    config = shrunk.config
    bounds = tolerances(config)
    attempts = []
    for number in range(MOST_SEEDS):
        seeded = _with(shrunk, run={"seed": config.run.seed + number})
        attempt = _attempt(seeded, groups, single, text, bounds)
        attempts.append(attempt)
        if not _share(groups, attempt is not None and attempt.tied):
            break
    if single is None:
        return None
    made = [attempt for attempt in attempts if attempt is not None]
    return Outcome(label(config), bounds, made, tuple(_microbatches(shrunk)), text.origin)


def _attempt(shrunk: Shrunk, groups: Groups, single: Groups | None, text: Text, bounds: Tolerances) -> Attempt | None:
    """Try one seed. Rank 0 runs the single process first, then all ranks run the grid, step by step."""
    config, steps = shrunk.config, shrunk.config.train.steps
    assert steps is not None
    partial_sums = partial_sums_of(config, groups.layout)
    reference = None if single is None else SingleProcess(shrunk.single_process(), single, text, steps, partial_sums)
    attempt = None
    if reference is not None:
        closest = min(step.choices.closest() for step in reference.steps)
        attempt = Attempt(config.run.seed, list(compare_formula(reference, bounds)), closest=closest)
    grid = ObservedTrainer(Trainer(config, groups, torch.device("cpu"), text.data(config)))
    for number in range(steps):
        if number:  # the first step begins with the grid's own initial weights
            grid.begin_with(_share(groups, None if reference is None else reference.steps[number].before))
        ranks = _collect(groups, grid.step())
        if reference is not None and attempt is not None:
            _compare(attempt, reference, number, ranks, bounds)
        if _share(groups, attempt is not None and bool(attempt.moved or attempt.near_balance)):
            break
    grid.trainer.close()
    return attempt


def _compare(
    attempt: Attempt, reference: SingleProcess, number: int, ranks: Sequence[RankStep], bounds: Tolerances
) -> None:
    expected, step = reference.steps[number], number + 1
    found = list(_differences(reference, number, ranks, bounds))
    attempt.differences += found
    if (moved := moved_choices(expected, ranks)) is not None:
        layer, choices = moved
        near = expected.choices.near(layer, bounds.tie, reference.trainer.config.model.num_experts_per_tok)
        attempt.moved.append(MovedChoices(step, layer, choices, near, expected.choices.closest()))
    elif any(each.departs for each in found):
        attempt.near_balance = expected.choices.near_balance(bounds.tie)


def _differences(
    reference: SingleProcess, number: int, ranks: Sequence[RankStep], bounds: Tolerances
) -> Iterator[Difference]:
    expected, step = reference.steps[number], number + 1
    # In the order in which a step computes them: the first departure is then the cause of later ones.
    yield from compare_numbers(step, expected, ranks, LOSSES, bounds.loss)
    yield from compare_gradients(step, reference, ranks, bounds)
    yield from compare_numbers(step, expected, ranks, ("grad_norm",), bounds.gradient)
    yield from compare_biases(step, expected, ranks)
    gradients = merge([each.gradients for each in ranks])
    if gradients.keys() == expected.values.gradients.keys():
        state = reference.updated(number, gradients, reference.trainer.config.optim.lr.at(0))
        yield from compare_state(step, state, ranks, bounds)
    yield from compare_copies(step, ranks)


def _with(shrunk: Shrunk, **sections: dict[str, Any]) -> Shrunk:
    """Return a copy with other values in some sections."""
    tree = plain(shrunk.config)
    for name, values in sections.items():
        tree[name].update(values)
    return Shrunk(Config.model_validate(tree), shrunk.layout, shrunk.changes, shrunk.lost)


def _microbatches(shrunk: Shrunk) -> Iterator[int]:
    config = shrunk.config
    steps = steps_from(Progress(), config.batch)
    for _, (_, sequences) in zip(range(config.train.steps or 0), steps, strict=False):
        yield config.batch.microbatches(sequences, shrunk.layout.dp)


def _share(groups: Groups, value: Any) -> Any:
    """Rank 0's value on every rank of the grid."""
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(groups.world, 0), group=groups.world)
    return values[0]


def _collect(groups: Groups, own: RankStep) -> list[RankStep]:
    """The steps of all ranks, on rank 0."""
    of_ranks: list[Any] = [None] * groups.layout.world_size
    first = dist.get_global_rank(groups.world, 0)
    dist.gather_object(own, of_ranks if groups.rank == 0 else None, dst=first, group=groups.world)
    return of_ranks
