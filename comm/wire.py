"""How rows of activations and gradients look while they travel: as they are, or in FP8 with their scales.

Tokens to the experts, and gradients to them in the backward, may travel in E4M3 with one power of two as scale for
each 128 values (V3 §3.3.3); what comes back is summed and keeps its format. A dispatcher quantises a token once,
whatever the number of its experts, and in every layout, also where nothing leaves the rank: layout never changes the
maths. T tokens, R rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..fp8.message import pack_message, unpack_message
from ..fp8.quantize import BlockQuantized
from ..fp8.recipe import Monitor, Quantizer
from ..fp8.tensor_formats import WIRE_FORMAT

Direction = Literal["forward", "backward"]


class Rows(NamedTuple):
    """Rows that have arrived."""

    values: Tensor
    """[R, H]"""
    codes: BlockQuantized | None
    """What they were quantised to, if they were; `values` is what it dequantises to, exactly."""


class WireFormat(Protocol):
    """Turns tokens into what travels, and what has arrived into rows."""

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        """x [T, H] -> a matrix of T rows of any type, to be copied row by row."""

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Rows:
        """Rows of such a matrix, in any order -> [R, width] in `dtype`. A row of zero bytes is one of zeros."""


class PlainWire:
    """Rows travel as they are."""

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        return x

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Rows:
        return Rows(rows if rows.dtype == dtype else rows.contiguous().view(dtype), None)


class FP8Wire:
    """Rows travel as messages of codes and scales, see `fp8/message.py`.

    Args:
        activation: what quantises tokens; its format is WIRE_FORMAT.
        gradient: what quantises gradients in the backward of combine.
        fused: makes messages of x BF16 [T, H] in one go, such as `pack_on_gpu`; it notes no infinities, and where
            somebody observes what is quantised the quantizers are asked.
    """

    def __init__(
        self,
        activation: Quantizer | None = None,
        gradient: Quantizer | None = None,
        fused: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        monitor = Monitor()
        self._quantizers: dict[Direction, Quantizer] = {
            "forward": activation or Quantizer("dispatch.input", WIRE_FORMAT, monitor),
            "backward": gradient or Quantizer("dispatch.gradient", WIRE_FORMAT, monitor),
        }
        for quantizer in self._quantizers.values():
            assert quantizer.format == WIRE_FORMAT, quantizer
        self._fused = fused

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        quantizer = self._quantizers[direction]
        if self._fused is not None and quantizer.monitor.observer is None and x.dtype == torch.bfloat16:
            return self._fused(x)
        return pack_message(quantizer.encode(x, 1))

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Rows:
        codes = unpack_message(rows, width)
        return Rows(codes.dequantize(dtype), codes)


def pack_on_gpu(x: Tensor) -> Tensor:
    """x BF16 [T, H] as messages, by the fused kernel: neither values nor scales lie in memory in between."""
    from ..fp8.triton import quantize_for_dispatch

    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return quantize_for_dispatch(x.contiguous(), rows, x.shape[0])
