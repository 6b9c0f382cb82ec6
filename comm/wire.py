"""Formats in which rows of activations and gradients are sent: unchanged, or in FP8 with their scales.

Tokens to the experts, and gradients to the experts in the backward, may be sent in E4M3 with one power of two as scale
per 128 values (V3 §3.3.3). Outputs and gradients back to the tokens are summed and keep their format. A dispatcher
quantises a token once, whatever the number of its experts, and in every layout, also where nothing leaves the rank: the
layout never changes the result. T tokens, R rows, H hidden.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..fp8.message import pack_message, unpack_message
from ..fp8.operations import has_kernel, quantize_messages, restore
from ..fp8.quantize import BlockQuantized
from ..fp8.recipe import Monitor, Quantizer
from ..fp8.tensor_formats import WIRE_FORMAT

Direction = Literal["forward", "backward"]


class Decoded(NamedTuple):
    """Rows that have arrived, decoded."""

    values: Tensor
    """[R, H]"""
    codes: BlockQuantized | None
    """Quantised form in which the rows were sent; `values` is exactly its dequantised value. None if unquantised."""


class WireFormat(Protocol):
    """Encoding of tokens into the rows that are sent, and decoding of the rows that arrive."""

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        """Encode x [T, H] as a matrix of T rows of any type, to be copied row by row."""

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Decoded:
        """Decode rows of such a matrix, in any order, to [R, width] in `dtype`. A row of zero bytes gives zeros."""


class PlainWire:
    """Rows sent unchanged."""

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        return x

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Decoded:
        return Decoded(rows if rows.dtype == dtype else rows.contiguous().view(dtype), None)


class FP8Wire:
    """Rows sent as messages of codes and scales, see `fp8/message.py`.

    Args:
        activation: quantizer of tokens; its format is WIRE_FORMAT.
        gradient: quantizer of gradients in the backward of combine.

    On a GPU one kernel makes the messages, except while an observer watches the quantised values.
    """

    def __init__(self, activation: Quantizer | None = None, gradient: Quantizer | None = None) -> None:
        monitor = Monitor()
        self._quantizers: dict[Direction, Quantizer] = {
            "forward": activation or Quantizer("dispatch.input", WIRE_FORMAT, monitor),
            "backward": gradient or Quantizer("dispatch.gradient", WIRE_FORMAT, monitor),
        }
        for quantizer in self._quantizers.values():
            assert quantizer.format == WIRE_FORMAT, quantizer

    def encode(self, x: Tensor, direction: Direction) -> Tensor:
        quantizer = self._quantizers[direction]
        if quantizer.monitor.observer is None and x.dtype == torch.bfloat16 and has_kernel(x.device):
            return quantize_messages(x, quantizer.monitor.flag(x.device))
        return pack_message(quantizer.encode(x, 1))

    def decode(self, rows: Tensor, dtype: torch.dtype, width: int) -> Decoded:
        codes = unpack_message(rows, width)
        return Decoded(restore(codes, dtype), codes)
