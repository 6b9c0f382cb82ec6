"""Costs from measured times, to compare a step that ran with its simulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from .actions import Action, Overlap
from .costs import Costs
from .timeline import Timeline


def measured_costs(timeline: Timeline) -> Costs:
    """The mean durations of each stage's actions in a timeline; transfers are free.

    A stage's B divides into I and W in the ratio of the stage's I and W that ran alone, or in halves. A stage that ran
    only in pairs gets the mean of the others, and its pairs save the rest.
    """
    alone: dict[tuple[str, int], list[float]] = defaultdict(list)
    pairs: list[tuple[Overlap, float]] = []
    for spans in timeline.spans:
        for action, start, end in spans:
            if isinstance(action, Overlap):
                pairs.append((action, end - start))
            else:
                alone[action.kind, action.stage].append(end - start)
    stages = range(timeline.schedule.num_stages)
    means = {kind: _fill([alone.get((kind, stage), ()) for stage in stages]) for kind in "FBIW"}
    forward, whole, inputs, weights = (means[kind] for kind in "FBIW")
    if whole is None and inputs is not None and weights is not None:
        whole = [i + w for i, w in zip(inputs, weights, strict=True)]
    assert forward is not None and whole is not None, "a step has forwards and backwards"
    shares = [0.5] * len(stages)
    if inputs is not None and weights is not None:
        shares = [i / (i + w) if i + w else 0.5 for i, w in zip(inputs, weights, strict=True)]
    divided = [(b * share, b * (1 - share)) for b, share in zip(whole, shares, strict=True)]
    backward_input, backward_weight = zip(*divided, strict=True)
    costs = Costs(tuple(forward), backward_input, backward_weight, hidden=(0.0,) * len(stages))
    return replace(costs, hidden=_saved(costs, pairs, len(stages)))


def _saved(costs: Costs, pairs: Iterable[tuple[Overlap, float]], num_stages: int) -> tuple[float, ...]:
    """Time that pairs save, by stage: each pair's saving counts for the stages of both of its halves.

    A saving is at most the shorter of the stage's F and B. Without this bound pairs would seem to take no time where
    another program slowed down the actions that ran alone.
    """
    saved: dict[int, list[float]] = defaultdict(list)
    for pair, duration in pairs:
        saving = costs.duration(pair.forward) + costs.duration(pair.backward) - duration
        for half in pair:
            saved[half.stage].append(saving)
    stages = range(num_stages)
    shorter = [min(costs.duration(Action("F", stage, 0)), costs.duration(Action("B", stage, 0))) for stage in stages]
    return tuple(min(fmean(saved[stage]), shorter[stage]) if stage in saved else 0.0 for stage in stages)


def _fill(durations: Sequence[Sequence[float]]) -> list[float] | None:
    """The mean of each stage; a stage without durations gets the mean of the others. None if no stage has any."""
    known = [fmean(each) for each in durations if each]
    if not known:
        return None
    return [fmean(each) if each else fmean(known) for each in durations]
