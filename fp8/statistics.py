"""Statistics of the quantisation of a step, by class of tensors: errors, underflow and saturation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from .number_formats import find_format
from .tensor_formats import TensorFormat
from .tiles import pieces


@dataclass
class Sums:
    """Sums over the values of the tensors of a class."""

    values: int = 0
    nonzero: int = 0
    zeroed: int = 0
    """Values that were not zero and became zero."""
    saturated: int = 0
    """Values that became the format's largest in their tile's scale."""
    squares: float = 0.0
    squared_error: float = 0.0
    rows: int = 0
    """Lines along which the product sums that are not all zero: tokens of inputs and gradients, channels for W."""
    row_errors: float = 0.0
    """Sum of each row's squared error by its own square."""
    worst_row: float = 0.0
    """Largest ||q - x|| / ||x|| of a row."""
    largest: float = 0.0
    smallest: float = math.inf
    """The least magnitude that is not zero."""

    def add(self, other: Sums) -> None:
        for field in fields(self):
            own, added = getattr(self, field.name), getattr(other, field.name)
            choose = {"largest": max, "smallest": min, "worst_row": max}.get(field.name)
            setattr(self, field.name, own + added if choose is None else choose(own, added))

    @property
    def error(self) -> float:
        """||q - x|| / ||x||."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0

    @property
    def row_error(self) -> float:
        """Root mean square of the errors of single rows. A small token has the same weight as a large one, so the
        statistic shows the losses of small tokens in the tiles of large ones."""
        return math.sqrt(self.row_errors / self.rows) if self.rows else 0.0

    @property
    def underflow(self) -> float:
        """Share of the nonzero values that became zero."""
        return self.zeroed / self.nonzero if self.nonzero else 0.0

    @property
    def saturation(self) -> float:
        """Share of all values that became the format's largest."""
        return self.saturated / self.values if self.values else 0.0

    @property
    def binades(self) -> float:
        """Powers of two between the least and the largest magnitude, zeros left out."""
        return math.log2(self.largest / self.smallest) if self.nonzero else 0.0

    def to_json(self) -> dict[str, float]:
        shares = {name: getattr(self, name) for name in ("error", "row_error", "underflow", "saturation", "binades")}
        sums = asdict(self)
        return shares | sums | {"smallest": sums["smallest"] if self.nonzero else 0.0}


class Statistics:
    """Observer for `Monitor` that adds up sums by class.

    A tensor is quantised for two products at most: with tiles along its rows for fprop and dgrad, and along its
    columns for W. The two have separate sums, because the inputs of W have been quantised before: their
    second loss is small and would hide the first.
    """

    def __init__(self) -> None:
        self.first: dict[str, Sums] = {}
        """By class, of operands of fprop and dgrad, of weights and caches."""
        self.for_weights: dict[str, Sums] = {}
        """By class, of operands of W."""

    def __call__(
        self,
        name: str,
        x: Tensor,
        values: Tensor,
        format: TensorFormat,
        contracted: int,
        offsets: Tensor | Sequence[int] | None,
    ) -> None:
        """Add one quantisation; see `fp8.recipe.Observer`."""
        weight = name.endswith(".weight")  # its product with dy contracts dimension 0, and is dgrad, not W
        into = self.first if contracted or weight else self.for_weights
        into.setdefault(name, Sums()).add(measure(x, values, format, contracted, offsets))


@torch.no_grad()
def measure(
    x: Tensor,
    values: Tensor,
    format: TensorFormat,
    contracted: int,
    offsets: Tensor | Sequence[int] | None = None,
) -> Sums:
    """Sums over x `[M, K]` or a stack `[E, M, K]`, and over the dequantised `values` of the same shape.

    Sums are in FP64. `contracted` and `offsets` give the tiles, as in `Quantizer.values`.
    """
    matrix, quantized = x.detach().flatten(0, -2), values.detach().flatten(0, -2)
    tile, biggest = format.tile(contracted), find_format(format.fmt).max
    total = Sums(values=matrix.numel())
    _add_rows(total, matrix, quantized, contracted)
    for piece in pieces(_segments(x, offsets, tile[0]), matrix.shape[1], tile, x.device):
        exact, rounded = piece.of(matrix).double(), piece.of(quantized).double()
        size = exact.abs()
        amax = size.amax((1, 3), keepdim=True)
        multiplier = torch.where(amax > 0, biggest / amax, 1.0)
        if format.pow2:
            multiplier = torch.ldexp(torch.ones_like(multiplier), multiplier.frexp().exponent - 1)
        nonzero = size > 0
        part = Sums(
            nonzero=int(nonzero.sum()),
            zeroed=int((nonzero & (rounded == 0)).sum()),
            # Below the largest value, the next one is smaller by at least a sixteenth in E4M3, a 128th in E5M6.
            saturated=int((rounded.abs() * multiplier > biggest * (1 - 2.0**-12)).sum()),
            squares=float(exact.square().sum()),
            squared_error=float((rounded - exact).square().sum()),
            largest=float(size.max()),
            smallest=float(size.masked_fill(~nonzero, math.inf).min()),
        )
        total.add(part)
    return total


def _add_rows(total: Sums, matrix: Tensor, quantized: Tensor, contracted: int) -> None:
    exact = matrix.double()
    squares = exact.square().sum(contracted)
    errors = (quantized.double() - exact).square().sum(contracted)[squares > 0] / squares[squares > 0]
    total.rows, total.row_errors = errors.numel(), float(errors.sum())
    total.worst_row = math.sqrt(float(errors.max())) if errors.numel() else 0.0


def _segments(x: Tensor, offsets: Tensor | Sequence[int] | None, height: int) -> Sequence[int]:
    """Rows of the segments in which tiles begin again."""
    if x.dim() == 3:
        return (x.shape[1],) * x.shape[0]
    if offsets is None or height == 1:
        return (x.shape[0],)
    ends = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    return [end - start for start, end in zip((0, *ends), ends, strict=False)]
