"""The split of layers into pipeline stages: an explicit list, or the split whose costliest stage is cheapest.

The embedding is on the first stage; the head and the MTP modules are on the last. These parts are no layers and
are added to their stages. Pure arithmetic on costs, which are numbers in any one unit.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..settings import UsageError


@dataclass(frozen=True)
class Split:
    """The layers of every stage, in order: consecutive, complete, at least one per stage."""

    layers: tuple[range, ...]

    def __post_init__(self) -> None:
        ends = [0, *(layers.stop for layers in self.layers)]
        assert all(layers == range(start, layers.stop) for start, layers in zip(ends, self.layers, strict=False))
        assert self.layers and all(self.layers), "a stage without a layer"

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], num_layers: int, num_stages: int) -> Split:
        """The split with `sizes[i]` layers on stage i. Raises UsageError if it does not fit layers and stages."""
        fault = sizes_fault(sizes, num_layers, num_stages)
        if fault:
            raise UsageError(fault)
        ends = [0, *itertools.accumulate(sizes)]
        return cls(tuple(itertools.starmap(range, itertools.pairwise(ends))))

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.layers))


def sizes_fault(sizes: Sequence[int], num_layers: int, num_stages: int) -> str | None:
    """The faults of an explicit split, with the numbers and an even split that works; None if it fits."""
    wrong = []
    if len(sizes) != num_stages:
        wrong.append(f"{_count(len(sizes), 'stage')}, but the schedule has {num_stages}")
    if sum(sizes) != num_layers:
        wrong.append(f"{_count(sum(sizes), 'layer')}, but the model has {num_layers}")
    if any(size < 1 for size in sizes):
        wrong.append("a stage without a layer")
    if not wrong:
        return None
    # More stages than layers is another fault, and has no split to propose.
    works = f" (for example {_even(num_layers, num_stages)})" if num_stages <= num_layers else ""
    return f"{list(sizes)} has {' and '.join(wrong)}{works}"


def balance(
    layer_costs: Sequence[float],
    first_extra: float,
    last_extra: float,
    num_stages: int,
    stages_of_rank: Sequence[Sequence[int]] = (),
) -> Split:
    """The contiguous split into `num_stages` stages whose largest cost is smallest.

    Stage i costs the sum of `layer_costs` over its layers; the first costs `first_extra` (the embedding) and the last
    `last_extra` (head and MTP) more. Ties go to the smallest sum of squares, which is the most even split, then to
    fewer layers on earlier stages, where most micro-batches are alive. The result is exact: costs are compared as
    fractions, not as rounded sums.

    `stages_of_rank` matters where a rank holds several stages: the step takes as long as the busiest rank, not the
    costliest stage. Starting from the split above, layers then move one at a time off the busiest rank, while this
    makes the ranks more even. This is greedy, so another split may be more even still. A stage on several ranks serves
    an equal share of micro-batches on each.

    Raises UsageError if there are fewer layers than stages.
    """
    if not 1 <= num_stages <= len(layer_costs):
        raise UsageError(
            f"{_count(len(layer_costs), 'layer')} cannot make up {_count(num_stages, 'stage')}, at least one layer "
            f"each: 1 to {len(layer_costs)} stages work"
        )
    if min(*layer_costs, first_extra, last_extra, 0.0) < 0:
        raise UsageError(f"costs of layers must not be negative: {[*layer_costs, first_extra, last_extra]}")
    costs = [Fraction(cost) for cost in layer_costs]
    # The first layer is always on the first stage and the last on the last, so the extras are part of their costs.
    costs[0] += Fraction(first_extra)
    costs[-1] += Fraction(last_extra)
    denominator = max(cost.denominator for cost in costs)  # powers of two, as floats are
    sums = [0, *itertools.accumulate(int(cost * denominator) for cost in costs)]
    split = Split(_most_even(sums, num_stages, _smallest_maximum(sums, num_stages)))
    if all(len(stages) == 1 for stages in stages_of_rank):
        return split
    return Split.of_sizes(_relieve_ranks(sums, split.sizes, stages_of_rank), len(layer_costs), num_stages)


def rank_loads(stage_costs: Sequence[float], stages_of_rank: Sequence[Sequence[int]]) -> list[float]:
    """Mean work of each rank for one micro-batch of the pipeline, in the unit of the costs."""
    holders = Counter(stage for stages in stages_of_rank for stage in stages)
    return [sum(stage_costs[stage] / holders[stage] for stage in stages) for stages in stages_of_rank]


def _relieve_ranks(sums: list[int], sizes: Sequence[int], stages_of_rank: Sequence[Sequence[int]]) -> list[int]:
    """Sizes after every move of a layer off the busiest rank that lowers, in this order: the largest load, the loads'
    sum of squares, the stages' sum of squares."""
    holders = Counter(stage for stages in stages_of_rank for stage in stages)
    whole = math.lcm(*holders.values())  # loads in this part of the costs' unit are whole numbers

    def weigh(sizes: Sequence[int]) -> tuple[tuple[int, int, int], list[int]]:
        ends = itertools.accumulate(sizes, initial=0)
        costs = [sums[stop] - sums[start] for start, stop in itertools.pairwise(ends)]
        loads = [sum(costs[stage] * (whole // holders[stage]) for stage in stages) for stages in stages_of_rank]
        return (max(loads), sum(load * load for load in loads), sum(cost * cost for cost in costs)), loads

    best, loads = weigh(sizes)
    while True:
        busiest, stages = stages_of_rank[loads.index(max(loads))], range(len(sizes))
        pairs = [(a, b) for a in busiest if sizes[a] > 1 for b in stages if b != a]
        moves = [[size - (stage == a) + (stage == b) for stage, size in enumerate(sizes)] for a, b in pairs]
        found = min(moves, key=lambda moved: weigh(moved)[0], default=sizes)
        weight, loads = weigh(found)
        if weight >= best:
            return list(sizes)
        best, sizes = weight, found


def _smallest_maximum(sums: list[int], num_stages: int) -> int:
    """The smallest possible cost of the costliest stage; `sums[i]` is the cost of the first i layers."""
    low, high = max(after - before for before, after in itertools.pairwise(sums)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(sums, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_needed(sums: list[int], limit: int) -> int:
    """The fewest stages that cost at most `limit` each. Cutting one in two gives more, so any larger number works."""
    stages, start = 1, 0
    for before, after in itertools.pairwise(sums):
        if after - start > limit:
            stages, start = stages + 1, before
    return stages


def _most_even(sums: list[int], num_stages: int, limit: int) -> tuple[range, ...]:
    """The split with no stage above `limit` that has the smallest sum of squares, then the shortest first stages.

    `best[i]` is the smallest sum of squares of layers i and later in the remaining stages, `cuts[i]` the end of the
    first of these stages.
    """
    num_layers = len(sums) - 1
    best: dict[int, int] = {num_layers: 0}
    plans: list[dict[int, int]] = []
    for stages_left in range(1, num_stages + 1):
        rest, best, cuts = best, {}, {}
        for start in range(num_stages - stages_left, num_layers - stages_left + 1):
            for stop in range(start + 1, num_layers - stages_left + 2):
                cost = sums[stop] - sums[start]
                if cost > limit:
                    break
                if stop in rest and (start not in best or rest[stop] + cost * cost < best[start]):
                    best[start], cuts[start] = rest[stop] + cost * cost, stop
        plans.append(cuts)
    layers, start = [], 0
    for cuts in reversed(plans):
        layers.append(range(start, cuts[start]))
        start = cuts[start]
    return tuple(layers)


def _even(num_layers: int, num_stages: int) -> list[int]:
    """Equally many layers per stage, the remainder on the first stages: the last also has head and MTP."""
    each, rest = divmod(num_layers, num_stages)
    return [each + (stage < rest) for stage in range(num_stages)]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
