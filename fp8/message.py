"""Quantised rows in one buffer, as dispatch sends them: payload, then scales, one message per row.

| bytes of a row of H values | hold |
| --- | --- |
| 0 to H | E4M3 codes |
| up to a multiple of 16 | zeros |
| 4 C(H) more | FP32 scales, one per tile of 128, in the machine's byte order |
| up to a multiple of 16 | zeros |

So rows, codes and scales are aligned for copies of 16 bytes. V3's H of 7168 needs no padding: 7,392 bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import UsageError
from .quantize import BlockQuantized
from .tensor_formats import SIDE

ALIGNMENT = 16  # bytes


def scale_start(width: int) -> int:
    """Offset in bytes of the scales in a message."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def message_bytes(width: int) -> int:
    """Bytes of a message that holds a row of `width` values."""
    needed = scale_start(width) + 4 * -(-width // SIDE)
    return -(-needed // ALIGNMENT) * ALIGNMENT


def pack_message(quantized: BlockQuantized) -> Tensor:
    """A matrix `[R, K]` in E4M3 and tiles of (1, 128) as messages uint8 `[R, message_bytes(K)]`."""
    assert quantized.tile == (1, SIDE) and quantized.fmt == "e4m3", quantized
    rows, width = quantized.shape
    message = quantized.data.new_empty((rows, message_bytes(width)), dtype=torch.uint8)
    start, tiles = scale_start(width), quantized.scale.shape[1]
    message[:, :width] = quantized.data.view(torch.uint8)
    message[:, width:start] = 0
    message[:, start : start + 4 * tiles] = quantized.scale.view(torch.uint8)
    message[:, start + 4 * tiles :] = 0
    return message


def unpack_message(message: Tensor, width: int, pow2_scales: bool = True) -> BlockQuantized:
    """Messages uint8 `[R, message_bytes(width)]` as a matrix `[R, width]` in tiles of (1, 128): views, without a copy.

    `pow2_scales` says whether the sender's scales are powers of two. Raises UsageError for another type or size.
    """
    if message.dtype != torch.uint8 or message.dim() != 2 or message.shape[1] != message_bytes(width):
        raise UsageError(
            f"messages for rows of {width} values are uint8 [any, {message_bytes(width)}], not {message.dtype} "
            f"{list(message.shape)}"
        )
    start, tiles = scale_start(width), -(-width // SIDE)
    codes = message[:, :width].view(torch.float8_e4m3fn)
    scales = message[:, start : start + 4 * tiles].view(torch.float32)
    return BlockQuantized(codes, scales, (1, SIDE), "e4m3", width, pow2_scales)
