"""What quantises the tensors of each class while a model runs; the classes and their formats are in `classes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .gemm import Mode, Operand
from .quantize import BlockQuantized, FP8RangeError, fake_quantize, quantize, quantize_with_values
from .tensor_formats import WITH_CACHE, Formats, Kind, TensorFormat

if TYPE_CHECKING:
    from .te.backend import Attention, TransformerEngine

Observer = Callable[[str, Tensor, Tensor, TensorFormat, int, Tensor | None], None]
"""Called with a class, a tensor, what its quantisation dequantises to, and the format; with the dimension that the
product contracts, which with the format gives the tiles, and the ends of the groups in which tiles begin anew."""


@dataclass
class Monitor:
    """What is watched while tensors are quantised."""

    observer: Observer | None = None
    infinite: list[str] = field(default_factory=list)
    """Classes in which infinities or NaN were met. Quantisation turns infinities into large numbers (see `quantize`),
    so nothing later would show them."""


@dataclass(frozen=True)
class Quantizer:
    """Quantises the tensors of one class. A class without a format passes them on as they are."""

    name: str
    format: TensorFormat | None
    monitor: Monitor

    def makes(self, codes: BlockQuantized) -> bool:
        """Whether what it makes of a matrix whose rows a product contracts could be `codes`."""
        format = self.format
        return format is not None and (format.tile(1), format.fmt, format.pow2) == (
            codes.tile,
            codes.fmt,
            codes.pow2_scales,
        )

    def values(self, x: Tensor, contracted: int, offsets: Tensor | None = None) -> Tensor:
        """What the quantised x `[M, K]`, or stack of them, dequantises to; `offsets` as in `quantize`."""
        if self.format is None:
            return x
        tile, fmt, pow2 = self.format.tile(contracted), self.format.fmt, self.format.pow2
        offsets = offsets if tile[0] > 1 else None  # tiles of one row belong to one group anyhow
        try:
            values = fake_quantize(x, tile, fmt, pow2, checked=True, offsets=offsets)
        except FP8RangeError:
            self.monitor.infinite.append(self.name)
            values = fake_quantize(x, tile, fmt, pow2, offsets=offsets)
        self._observe(x, values, contracted, offsets)
        return values

    def encode(self, x: Tensor, contracted: int, offsets: Tensor | None = None) -> BlockQuantized:
        """x quantised; the class must have a format."""
        return self.encode_with_values(x, contracted, offsets, with_values=False)[0]

    def encode_with_values(
        self, x: Tensor, contracted: int, offsets: Tensor | None = None, with_values: bool = True
    ) -> tuple[BlockQuantized, Tensor | None]:
        """x quantised, to keep, and its values, to compute with."""
        assert self.format is not None
        tile, fmt, pow2 = self.format.tile(contracted), self.format.fmt, self.format.pow2
        offsets = offsets if tile[0] > 1 else None
        if self.monitor.observer is not None:
            with_values = True

        def run(checked: bool) -> tuple[BlockQuantized, Tensor | None]:
            if with_values:
                return quantize_with_values(x, tile, fmt, pow2, checked, offsets=offsets)
            return quantize(x, tile, fmt, pow2, checked, offsets=offsets), None

        try:
            codes, values = run(checked=True)
        except FP8RangeError:
            self.monitor.infinite.append(self.name)
            codes, values = run(checked=False)
        if values is not None:
            self._observe(x, values, contracted, offsets)
        return codes, values

    def _observe(self, x: Tensor, values: Tensor, contracted: int, offsets: Tensor | None) -> None:
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
    backend: TransformerEngine | None = None
    """What computes the products; None emulates them."""

    def operand(self, quantizer: Quantizer, x: Tensor, contracted: int, offsets: Tensor | None = None) -> Operand:
        """x as an operand of a product: its values for `fast`, codes and scales for `promoted`."""
        if self.mode == "promoted" and quantizer.format is not None:
            return quantizer.encode(x, contracted, offsets)
        return quantizer.values(x, contracted, offsets)


@dataclass(frozen=True)
class Recipe:
    """What a model's linear layers are told; `Recipe()` leaves everything in high precision."""

    formats: Formats = field(default_factory=dict)
    mode: Mode = "fast"
    """How products are computed, see `gemm`; those with an operand in high precision are always `fast`."""
    monitor: Monitor = field(default_factory=Monitor)
    backend: TransformerEngine | None = None
    """Transformer Engine; None emulates the products of quantised operands, on any device."""

    def linear(self, kind: Kind) -> LinearRecipe | None:
        """That of a layer of this kind; None if it is all in high precision."""
        roles = ("input", "weight", "gradient", "cache")
        if not any(self.formats.get(f"{kind}.{role}") for role in roles):
            return None
        of = {role: Quantizer(f"{kind}.{role}", self.formats.get(f"{kind}.{role}"), self.monitor) for role in roles}
        cache = of["cache"] if kind in WITH_CACHE else None
        # With a cache alone there is no product of quantised operands.
        backend = self.backend if of["weight"].format is not None else None
        return LinearRecipe(of["input"], of["weight"], of["gradient"], cache, self.mode, backend)

    @property
    def alignment(self) -> int:
        """The rows that reach each of the experts are a multiple of it."""
        quantised = self.formats.get("experts_up.weight") or self.formats.get("experts_down.weight")
        return 1 if self.backend is None or not quantised else self.backend.alignment

    def attention(self, heads: int, qk_width: int, v_width: int) -> Attention | None:
        """What computes causal attention, see `TransformerEngine.attention`; None leaves it to PyTorch."""
        return None if self.backend is None else self.backend.attention(heads, qk_width, v_width)
