"""Comparison of a step on the ranks of a grid with the same step in a single process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..configs.config import Config
from ..training.parameter_classes import parameter_class
from .run import OwnedRows, RankStep, ReferenceStep, SingleProcess

EXACT = 0.0
LOSSES = ("loss", "loss_mtp", "loss_balance", "loss_device", "loss_communication")

CLASSES = ("embedding", "attention", "router", "experts", "shared experts", "dense", "norms", "head", "MTP")
KIND_OF_CLASS = {
    **{name: name for name in ("embedding", "attention", "router", "norms", "head")},
    "attention_out": "attention",
    **dict.fromkeys(("experts_up", "experts_down"), "experts"),
    **dict.fromkeys(("shared_up", "shared_down"), "shared experts"),
    **dict.fromkeys(("dense_up", "dense_down"), "dense"),
}
"""Kind of each class of `training/parameter_classes.py` outside MTP modules."""


@dataclass(frozen=True)
class Tolerances:
    """Bounds of differences, relative to the single process's figure or to a tensor's largest value."""

    loss: float
    gradient: float
    weight: float
    """Bound of master weights, compared with a single process that steps with the same gradients."""
    moment: float
    tie: float
    """Distance by which rounding moves a routing score: closer choices may come out either way."""


TOLERANCES = {
    "fp32": Tolerances(loss=1e-5, gradient=1e-5, weight=1e-6, moment=1e-5, tie=2e-6),
    # Gradients are rounded to BF16 once per micro-batch, and an expert's micro-batch has other rows in other layouts:
    # by 2^-8 of an element each time. The most seen was 6.4e-3 of a tensor's largest value.
    "bf16": Tolerances(loss=1e-4, gradient=2e-2, weight=1e-6, moment=1e-5, tie=2e-3),
    # A sum that differs in its last bit sometimes becomes another eight-bit code: 2^-4 of an element.
    # With FP32 scales every code of a tile follows the tile's largest value, and in other layouts an expert's tiles
    # hold other tokens. The most seen was 3.6e-2.
    "fp8": Tolerances(loss=1e-3, gradient=1e-1, weight=1e-6, moment=1e-5, tie=1e-2),
    "fp8 on fp32": Tolerances(loss=1e-5, gradient=1e-3, weight=1e-6, moment=1e-5, tie=1e-4),
}
BF16_REDUCE = 2e-2
"""Bound of gradients that are sent in BF16.

Each rank's sum of its micro-batches is rounded by up to 2^-9 of an element. The most seen was 3.5e-3 of a tensor's
largest value, 8e-3 with weights in BF16.
"""

BF16_MOMENT = 1e-2
"""Bound of moments that are kept in BF16: a last bit of FP32 may turn into one of BF16."""


def precision_name(config: Config) -> str:
    """Name of the precision, one of TOLERANCES."""
    precision = config.precision
    return "fp8 on fp32" if precision.recipe == "fp8" and precision.high == "fp32" else precision.recipe


def label(config: Config) -> str:
    """Formats that the configuration computes in and reduces gradients in, in words."""
    name = precision_name(config)
    return f"{name}, reduce bf16" if config.optim.reduce == "bf16" else name


def tolerances(config: Config) -> Tolerances:
    """Bounds for the configuration's formats."""
    bounds = TOLERANCES[precision_name(config)]
    if config.optim.reduce == "bf16":
        bounds = replace(bounds, gradient=max(bounds.gradient, BF16_REDUCE))
    return replace(bounds, moment=BF16_MOMENT) if config.optim.moments == "bf16" else bounds


@dataclass(frozen=True)
class Difference:
    """Difference of one quantity of one step between the grid and the single process."""

    step: int
    quantity: str
    name: str
    """Name of the global tensor, or of the number."""
    kind: str
    """One of CLASSES for tensors."""
    largest: float
    """Largest difference of two elements; infinite where only one side has the quantity."""
    scale: float
    """Largest value in the single process."""
    bound: float
    ranks: tuple[int, ...]
    """Ranks that hold the quantity."""

    @property
    def error(self) -> float:
        if self.largest == 0:
            return 0.0
        return self.largest / self.scale if self.scale else math.inf

    @property
    def departs(self) -> bool:
        return not self.error <= self.bound  # NaN departs too


def parameter_kind(name: str) -> str:
    """Kind of a global tensor, one of CLASSES, by its name: coarser than its class, and MTP modules are one kind."""
    return "MTP" if name.startswith("mtp.") else KIND_OF_CLASS[parameter_class(name)]


def compare_numbers(
    step: int, expected: ReferenceStep, ranks: Sequence[RankStep], names: Sequence[str], bound: float
) -> Iterator[Difference]:
    """Differences of the step's numbers, each on the rank that is furthest off."""
    all_ranks = tuple(each.rank for each in ranks)
    for name in names:
        if name in expected.values.numbers:
            number = expected.values.numbers[name]
            largest = max(_known(abs(each.numbers.get(name, math.nan) - number)) for each in ranks)
            yield Difference(step, "number", name, name, largest, abs(number), bound, all_ranks)


def compare_gradients(
    step: int, reference: SingleProcess, ranks: Sequence[RankStep], bounds: Tolerances
) -> Iterator[Difference]:
    """Differences of summed gradients in the order of the backward: a fault comes before those that it causes."""
    expected = reference.steps[step - 1].values.gradients
    merged, held = merge([each.gradients for each in ranks]), holders(ranks)
    for name in backward_order(reference.formula):
        tensor = expected[name].values
        yield difference(step, "gradient", name, merged.get(name), tensor, bounds.gradient, held.get(name, ()))


def compare_formula(reference: SingleProcess, bounds: Tolerances) -> Iterator[Difference]:
    """Differences of the single process's gradients of step 1 from those of plain autograd."""
    found = reference.steps[0].values.gradients
    for name in backward_order(reference.formula):
        expected = reference.formula[name]
        yield difference(1, "plain gradient", name, found[name].values, expected, bounds.gradient, (0,))


def compare_biases(step: int, expected: ReferenceStep, ranks: Sequence[RankStep]) -> Iterator[Difference]:
    """Differences of router biases on every rank that holds them. Equal counts make them equal to the last bit."""
    for name, bias in expected.values.biases.items():
        copies = {each.rank: each.biases[name] for each in ranks if name in each.biases}
        worst = max(copies, key=lambda rank: _off(copies[rank], bias), default=None)
        found = None if worst is None else copies[worst]
        yield difference(step, "bias", name, found, bias, EXACT, tuple(copies))


def compare_state(
    step: int, expected: Mapping[str, Tensor], ranks: Sequence[RankStep], bounds: Tolerances
) -> Iterator[Difference]:
    """Differences of master weights and moments after the step from `expected`, the state from the same gradients."""
    merged, held = merge([each.state for each in ranks]), holders(ranks)
    for quantity, bound in (("weight", bounds.weight), ("exp_avg", bounds.moment), ("exp_avg_sq", bounds.moment)):
        prefix = "weights." if quantity == "weight" else f"{quantity}."
        for full_name, tensor in expected.items():
            if full_name.startswith(prefix):
                name = full_name.removeprefix(prefix)
                yield difference(step, quantity, name, merged.get(full_name), tensor, bound, held.get(name, ()))


def compare_copies(step: int, ranks: Sequence[RankStep]) -> Iterator[Difference]:
    """Differences of every rank's copy of a weight from the rounded master weight; they should be bit-equal."""
    masters, held = merge([each.state for each in ranks]), holders(ranks)
    for name, at in held.items():
        copies = {each.rank: each.copies[name] for each in ranks if name in each.copies}
        expected = masters[f"weights.{name}"]
        for rank in at:
            copy = copies[rank]
            if not torch.equal(copy, expected.to(copy.dtype).view_as(copy)):
                yield difference(step, "copy", name, copy, expected.to(copy.dtype), EXACT, (rank,))
                break
        else:
            yield Difference(step, "copy", name, parameter_kind(name), 0.0, float(expected.abs().max()), EXACT, at)


def moved_choices(expected: ReferenceStep, ranks: Sequence[RankStep]) -> tuple[int, int] | None:
    """The first MoE layer whose experts were sent other numbers of tokens, and how many choices moved there.

    A difference in one layer moves tokens in later layers too, so only the first layer shows the cause.
    """
    found = torch.stack([each.counts for each in ranks]).sum(0)
    off = (found - expected.values.counts).abs().sum(1)
    if not bool(off.any()):
        return None
    layer = int(off.nonzero()[0])
    return layer, -(-int(off[layer]) // 2)


def merge(parts: Sequence[Mapping[str, OwnedRows]]) -> dict[str, Tensor]:
    """Whole tensors from the rows that the ranks own; NaN where no rank or several own a row."""
    owners: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for part in parts:
        for name, rows in part.items():
            if name not in whole:
                whole[name], owners[name] = torch.zeros(rows.shape), torch.zeros(rows.shape[0])
            owned = slice(rows.start, rows.start + rows.values.shape[0])
            whole[name][owned] = rows.values.float()
            owners[name][owned] += 1
    for name, number in owners.items():
        whole[name][number != 1] = math.nan
    return whole


def holders(ranks: Sequence[RankStep]) -> dict[str, tuple[int, ...]]:
    """Ranks that have a copy, of every global tensor."""
    held: dict[str, tuple[int, ...]] = {}
    for each in ranks:
        for name in each.copies:
            held[name] = (*held.get(name, ()), each.rank)
    return held


def backward_order(names: Iterable[str]) -> list[str]:
    """Global tensors in the order in which the backward reaches them, from the order of the model's modules."""

    def position(name: str) -> tuple[int, int]:
        first, _, rest = name.partition(".")
        order = {"mtp": 0, "head": 1, "norm": 2, "layers": 3, "embedding": 4}
        number = rest.partition(".")[0]
        return order[first], -int(number) if number.isdecimal() else 0

    ordered = [*names]
    ordered.reverse()
    ordered.sort(key=position)
    return ordered


def difference(
    step: int, quantity: str, name: str, found: Tensor | None, expected: Tensor, bound: float, ranks: tuple[int, ...]
) -> Difference:
    """Largest difference of the elements of two tensors, with the largest value of the expected one."""
    largest = math.inf if found is None else _off(found, expected)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return Difference(step, quantity, name, parameter_kind(name), largest, scale, bound, ranks)


def _off(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return _known(float((found.float().view_as(expected) - expected.float()).abs().max()))


def _known(value: float) -> float:
    return math.inf if math.isnan(value) else value
