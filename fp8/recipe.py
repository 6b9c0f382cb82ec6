"""Recipes: the formats of a model's linear layers, and the backend that computes their products.

The classes of tensors and their formats are in `tensor_formats`. The Protocols here state the functions of a backend
such as Transformer Engine, so a backend imports this module and this module imports no backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..weight_gradients import GradientSink, WeightQueue
from .gemm import Mode, Operand
from .kept import Kept
from .operations import groups_on, has_kernel, quantize_both, quantize_rows, restore
from .products import Products
from .quantize import BlockQuantized, FP8RangeError, fake_quantize, quantize, quantize_with_values, reads_values
from .tensor_formats import WITH_CACHE, Formats, Kind, TensorFormat

Observer = Callable[[str, Tensor, Tensor, TensorFormat, int, Tensor | Sequence[int] | None], None]
"""Observer of one quantisation: class, tensor, dequantised values, format, contracted dimension, ends of groups.

The contracted dimension and the format give the tiles; those of 128 rows begin again with each group.
"""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of queries that are already scaled: query and key `[B, A, S, D]`, value and result
`[B, A, S, V]` (A heads)."""


class LayerEngine(Protocol):
    """A backend's computation of one linear layer, plain or of experts."""

    def __call__(
        self,
        x: Tensor,
        weight: nn.Parameter,
        queue: WeightQueue | None,
        sink: GradientSink | None,
        kept: Kept | None = None,
        rebuilt: bool = False,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return y of x `[..., K]` and weight `[N, K]`, or of rows `[R, K]` and a stack `[E, N, K]` with E `counts`.

        `queue` takes the weight's gradient while it defers. Without a `sink` the gradient goes to `weight.grad`.
        `kept` and `rebuilt` as in `Linear`.
        """


class Backend(Protocol):
    """A library that computes quantised layers, on one device."""

    @property
    def library(self) -> Any:
        """The library itself, for the optimizer's update."""

    @property
    def alignment(self) -> int:
        """Number that divides the number of rows of every expert."""

    def linear(self, recipe: LinearRecipe, num_groups: int | None = None) -> LayerEngine:
        """Return the computation of a linear layer, or of `num_groups` experts."""

    def attention(self, heads: int, qk_width: int, v_width: int) -> Attention:
        """Return causal attention for these widths. All operands lie in memory as `[B, S, A, …]`."""


@dataclass
class Monitor:
    """Watch over the quantisation of tensors: an observer, and a list of faults."""

    observer: Observer | None = None
    infinite: list[str] = field(default_factory=list)
    """Classes in which infinities or NaN were met. Quantisation turns infinities into large numbers (see `quantize`),
    so nothing later would show them."""
    _flags: dict[torch.device, Tensor] = field(default_factory=dict)

    def flag(self, device: torch.device) -> Tensor | None:
        """int32 `[1]` that quantisation on `device` sets to 1 where infinities or NaN are met; None on a CPU, where
        `infinite` names the class."""
        if reads_values(device):
            return None
        if device not in self._flags:
            self._flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._flags[device]

    def clear(self) -> None:
        """Forget what was met."""
        self.infinite.clear()
        for flag in self._flags.values():
            flag.zero_()

    def spoil(self, sums: Tensor) -> None:
        """Make `sums` NaN if infinities or NaN were met. The host waits for nothing."""
        if self.infinite:
            sums.fill_(math.nan)
        for flag in self._flags.values():
            sums.masked_fill_(flag > 0, math.nan)


@dataclass(frozen=True)
class Quantizer:
    """Quantises the tensors of one class. A class without a format passes them on as they are."""

    name: str
    format: TensorFormat | None
    monitor: Monitor

    def makes(self, codes: BlockQuantized) -> bool:
        """Whether `codes` have the format of this class for a product that contracts columns."""
        format = self.format
        return format is not None and (format.tile(1), format.fmt, format.pow2) == (
            codes.tile,
            codes.fmt,
            codes.pow2_scales,
        )

    def values(self, x: Tensor, contracted: int, offsets: Tensor | Sequence[int] | None = None) -> Tensor:
        """Dequantised values of the quantised x `[M, K]`, or of a stack; `offsets` as in `quantize`."""
        if self.format is None:
            return x
        tile, fmt, pow2 = self.format.tile(contracted), self.format.fmt, self.format.pow2
        offsets = offsets if tile[0] > 1 else None  # tiles of one row are the same with any groups
        met = self.monitor.flag(x.device)
        if self._by_rows(x, contracted):
            return restore(quantize_rows(x, fmt, pow2, met))
        try:
            values = fake_quantize(x, tile, fmt, pow2, checked=True, offsets=offsets, met=met)
        except FP8RangeError:
            self.monitor.infinite.append(self.name)
            values = fake_quantize(x, tile, fmt, pow2, offsets=offsets)
        self._observe(x, values, contracted, offsets)
        return values

    def encode(self, x: Tensor, contracted: int, offsets: Tensor | Sequence[int] | None = None) -> BlockQuantized:
        """x quantised; the class must have a format."""
        return self.encode_with_values(x, contracted, offsets, with_values=False)[0]

    def encode_with_values(
        self, x: Tensor, contracted: int, offsets: Tensor | Sequence[int] | None = None, with_values: bool = True
    ) -> tuple[BlockQuantized, Tensor | None]:
        """x quantised, to keep, and its values, to compute with."""
        assert self.format is not None
        tile, fmt, pow2 = self.format.tile(contracted), self.format.fmt, self.format.pow2
        offsets = offsets if tile[0] > 1 else None
        if self.monitor.observer is not None:
            with_values = True
        met = self.monitor.flag(x.device)

        def run(checked: bool) -> tuple[BlockQuantized, Tensor | None]:
            if self._by_rows(x, contracted):
                codes = quantize_rows(x, fmt, pow2, met)
                return codes, restore(codes) if with_values else None
            if with_values:
                return quantize_with_values(x, tile, fmt, pow2, checked, offsets=offsets, met=met)
            return quantize(x, tile, fmt, pow2, checked, offsets=offsets, met=met), None

        try:
            codes, values = run(checked=True)
        except FP8RangeError:
            self.monitor.infinite.append(self.name)
            codes, values = run(checked=False)
        if values is not None:
            self._observe(x, values, contracted, offsets)
        return codes, values

    def encode_both(self, x: Tensor, ends: Sequence[int] | None = None) -> tuple[BlockQuantized, BlockQuantized]:
        """x `[M, K]` quantised along the columns, as `encode(x, 1)`, and along the rows, as `encode(x, 0, ends)`."""
        if self.has_kernel(x):
            assert self.format is not None
            return quantize_both(x, groups_on(x.device, ends), self.format.pow2, self.monitor.flag(x.device))
        return self.encode(x, 1, ends), self.encode(x, 0, ends)

    def _by_rows(self, x: Tensor, contracted: int) -> bool:
        """Whether one kernel quantises x along its columns, and one restores it."""
        assert self.format is not None
        rows = self.format.tile(contracted)[0] == 1 and x.dim() == 2 and self.monitor.observer is None
        return rows and has_kernel(x.device, self.format.fmt, x.shape[1])

    @property
    def is_plain(self) -> bool:
        """Whether the class is in E4M3 with tiles along the contraction, and nothing observes its values."""
        format = self.format
        return format is not None and (format.fmt, format.square) == ("e4m3", False) and self.monitor.observer is None

    def has_kernel(self, x: Tensor) -> bool:
        """Whether one kernel quantises x `[M, K]` along both dimensions, off the CPU."""
        return self.is_plain and x.dtype == torch.bfloat16 and has_kernel(x.device)

    def _observe(self, x: Tensor, values: Tensor, contracted: int, offsets: Tensor | Sequence[int] | None) -> None:
        if self.monitor.observer is not None:
            assert self.format is not None
            self.monitor.observer(self.name, x, values, self.format, contracted, offsets)


@dataclass(frozen=True)
class LinearRecipe:
    """The classes of one linear layer."""

    input: Quantizer
    weight: Quantizer
    gradient: Quantizer
    cache: Quantizer | None
    """None where the input itself is kept, as fprop saw it."""
    mode: Mode
    backend: Backend | None = None
    """Library that computes the products; None emulates them."""
    products: Products = field(default_factory=Products)
    """Products of values, on a CPU natively or widened."""

    @property
    def quantises(self) -> bool:
        """Whether any class has a format. Without one the layer multiplies in the format of its operands."""
        return any(q is not None and q.format is not None for q in (self.input, self.weight, self.gradient, self.cache))

    def operand(
        self, quantizer: Quantizer, x: Tensor, contracted: int, offsets: Tensor | Sequence[int] | None = None
    ) -> Operand:
        """x as an operand of a product: its values for `fast`, codes and scales for `promoted`."""
        if self.mode == "promoted" and quantizer.format is not None:
            return quantizer.encode(x, contracted, offsets)
        return quantizer.values(x, contracted, offsets)


@dataclass(frozen=True)
class Recipe:
    """Formats and backend of a model's linear layers; `Recipe()` leaves everything in high precision."""

    formats: Formats = field(default_factory=dict)
    mode: Mode = "fast"
    """Way to compute products, see `gemm`; products with an operand in high precision are always `fast`."""
    monitor: Monitor = field(default_factory=Monitor)
    backend: Backend | None = None
    """Library such as Transformer Engine; None emulates the products of quantised operands, on any device."""
    products: Products = field(default_factory=Products)
    """Products of values, on a CPU natively or widened."""

    def linear(self, kind: Kind) -> LinearRecipe:
        """Recipe of a layer of this kind."""
        roles = ("input", "weight", "gradient", "cache")
        of = {role: Quantizer(f"{kind}.{role}", self.formats.get(f"{kind}.{role}"), self.monitor) for role in roles}
        cache = of["cache"] if kind in WITH_CACHE else None
        # With a cache alone there is no product of quantised operands.
        backend = self.backend if of["weight"].format is not None else None
        return LinearRecipe(of["input"], of["weight"], of["gradient"], cache, self.mode, backend, self.products)

    @property
    def alignment(self) -> int:
        """Number that divides the number of rows that reach each expert."""
        quantised = self.formats.get("experts_up.weight") or self.formats.get("experts_down.weight")
        return 1 if self.backend is None or not quantised else self.backend.alignment

    def attention(self, heads: int, qk_width: int, v_width: int) -> Attention | None:
        """Return the backend's causal attention; None leaves attention to PyTorch."""
        return None if self.backend is None else self.backend.attention(heads, qk_width, v_width)
