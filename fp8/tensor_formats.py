"""Classes of tensors that training quantises, with one format per class.

A class is a kind of linear layer and a role in it, such as `experts_down.gradient`. The kinds:

    attention       projections to queries, keys and values, and to their latents
    attention_out   projection of the attention's output
    dense_up        gate and up projection of dense layers; dense_down the projection after SwiGLU
    shared_up       the same of shared experts; shared_down
    experts_up      the same of routed experts; experts_down
    mtp             projection of an MTP module

The roles: `input` (x of fprop and of wgrad), `weight` (of fprop and of dgrad), `gradient` (dy of dgrad and of wgrad).
Four kinds have a fourth, `cache`: the tensor that the forward keeps for wgrad instead of the input as fprop saw it. For
attention_out it is the attention's output. For the `down` layers it is SwiGLU's input, and SwiGLU's output is computed
from it again.

DeepSeek-V3's recipe (V3 §3.3, appendix B): all three products of these layers in E4M3, tiles of 1 x 128 for inputs
and gradients and of 128 x 128 for weights, scales from the maximum of the tile itself; the attention's output cached
in E5M6, SwiGLU's input in E4M3. Embedding, output head, MoE gating, normalisation and the attention itself have no
class: they stay in high precision. V3 gives power-of-two scales to three classes alone: the inputs of the linear
after the attention, activations before the MoE up-projections, and gradients before the MoE down-projections
(`scales: v3`). Here powers of two are the default for all (`scales: pow2`), as in Transformer Engine and since
DeepSeek-V3.1: a value is then rounded alike in every tile, unless it is 2^15 times smaller than the tile's largest
value. So it does not matter which tokens share a tile, and layouts do not change the result. Dequantised values are
exact in BF16, and Blackwell has no other scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FormatName = Literal["e4m3", "e5m2", "e5m6"]
Tile = tuple[int, int]
SIDE = 128  # elements along a tile, V3's N_C (V3 §3.3.1)

Kind = Literal[
    "attention",
    "attention_out",
    "dense_up",
    "dense_down",
    "shared_up",
    "shared_down",
    "experts_up",
    "experts_down",
    "mtp",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
WITH_CACHE: tuple[Kind, ...] = ("attention_out", "dense_down", "shared_down", "experts_down")

CLASSES: tuple[str, ...] = (
    *(f"{kind}.{role}" for kind in KINDS for role in ("input", "weight", "gradient")),
    *(f"{kind}.cache" for kind in WITH_CACHE),
)
"""Every class of tensors that a recipe can quantise."""

_POWERS_OF_TWO_IN_V3 = (
    "attention_out.input",
    "attention_out.cache",
    "experts_up.input",
    "shared_up.input",
    "experts_down.gradient",
    "shared_down.gradient",
)


@dataclass(frozen=True)
class TensorFormat:
    """Format of the tensors of a class."""

    fmt: FormatName = "e4m3"
    square: bool = False
    """Tiles of 128 x 128, else of 128 along the contraction."""
    pow2: bool = True

    def tile(self, contracted: int) -> Tile:
        """The tile for a product that contracts the matrix's rows (0) or columns (1)."""
        if self.square:
            return SIDE, SIDE
        return (1, SIDE) if contracted else (SIDE, 1)

    def __str__(self) -> str:
        return f"{self.fmt} {'128x128' if self.square else '1x128'} {'pow2' if self.pow2 else 'fp32'}"


WIRE_FORMAT = TensorFormat("e4m3", square=False, pow2=True)
"""Format of rows that travel between ranks in FP8; V3 and the default recipe quantise the experts' input so."""

Formats = Mapping[str, TensorFormat | None]
"""Format of every class; None leaves a class in high precision."""


def v3_formats(scales: Literal["pow2", "v3"] = "pow2") -> dict[str, TensorFormat | None]:
    """DeepSeek-V3's formats, with power-of-two scales for all classes, or for the classes that V3 names."""
    formats: dict[str, TensorFormat | None] = {}
    for name in CLASSES:
        pow2 = scales == "pow2" or name in _POWERS_OF_TWO_IN_V3
        fmt: FormatName = "e5m6" if name == "attention_out.cache" else "e4m3"
        formats[name] = TensorFormat(fmt, square=name.endswith(".weight"), pow2=pow2)
    return formats
