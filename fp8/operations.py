"""Quantisation as torch operations: on a GPU one Triton kernel each, on a CPU the formulas of `quantize`.

To a dry run each is one operation with its inputs and results. Infinities and NaN set the flag `met` int32 `[1]` to 1,
where a flag is given: the host waits for nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..kernels.op import fused
from .message import message_bytes, pack_message
from .number_formats import find_format
from .quantize import BlockQuantized, quantize
from .tensor_formats import SIDE, FormatName
from .triton import dequantize_rows as _dequantize_on_gpu
from .triton import packs
from .triton import quantize_for_dispatch as _message_on_gpu
from .triton import quantize_rows as _quantize_on_gpu

_ROWS = (1, SIDE)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernel(device: torch.device, fmt: FormatName = "e4m3", width: int = SIDE) -> bool:
    """Whether one kernel of this device quantises rows of `width` values to `fmt`, and restores them."""
    if device.type == "cpu" or (device.type == "cuda" and not _has_triton()):
        return False
    return fmt == "e4m3" or (fmt == "e5m6" and packs(width))


def quantize_rows(
    x: Tensor, fmt: FormatName = "e4m3", pow2_scales: bool = True, met: Tensor | None = None
) -> BlockQuantized:
    """x `[M, K]`, BF16 or FP32, in E4M3 or E5M6 with tiles of (1, 128); see `has_kernel`."""
    x = x.detach()
    data, scale = _quantize_rows(x if x.is_contiguous() else x.contiguous(), fmt, pow2_scales, met)
    return BlockQuantized(data, scale, _ROWS, fmt, x.shape[1], pow2_scales)


def restore(matrix: BlockQuantized, dtype: torch.dtype | None = None) -> Tensor:
    """`matrix.dequantize(dtype)`, off the CPU by one kernel for tiles of (1, 128), in messages too."""
    if matrix.tile != _ROWS or matrix.data.dim() != 2 or not has_kernel(matrix.data.device, matrix.fmt, matrix.width):
        return matrix.dequantize(dtype)
    dtype = dtype or (torch.bfloat16 if matrix.pow2_scales else torch.float32)
    values: Tensor = _dequantize_rows(matrix.data, matrix.scale, matrix.fmt, matrix.width, matrix.pow2_scales, dtype)
    return values


def quantize_messages(x: Tensor, met: Tensor | None = None) -> Tensor:
    """x BF16 `[T, H]` as messages uint8 `[T, message_bytes(H)]` in E4M3 with power-of-two scales."""
    messages: Tensor = _quantize_messages(x.detach().contiguous(), met)
    return messages


def _quantize_shapes(x: Tensor, fmt: FormatName, pow2: bool, met: Tensor | None) -> tuple[Tensor, Tensor]:
    found = find_format(fmt)
    codes = x.new_empty(x.shape[0], found.bytes_per_row(x.shape[1]), dtype=found.dtype)
    return codes, x.new_empty(x.shape[0], -(-x.shape[1] // SIDE), dtype=torch.float32)


def _tensors(matrix: BlockQuantized) -> tuple[Tensor, Tensor]:
    return matrix.data, matrix.scale


def _restored(data: Tensor, scale: Tensor, fmt: FormatName, width: int, pow2: bool) -> BlockQuantized:
    return BlockQuantized(data, scale, _ROWS, fmt, width, pow2)


_quantize_rows = fused(
    "fp8_quantize_rows(Tensor x, str fmt, bool pow2, Tensor(a!)? met) -> (Tensor, Tensor)",
    gpu=lambda x, fmt, pow2, met: _tensors(_quantize_on_gpu(x, fmt, pow2, met)),
    formula=lambda x, fmt, pow2, met: _tensors(quantize(x, _ROWS, fmt, pow2, met=met)),
    shapes=_quantize_shapes,
)
_dequantize_rows = fused(
    "fp8_dequantize_rows(Tensor data, Tensor scale, str fmt, int width, bool pow2, ScalarType dtype) -> Tensor",
    gpu=lambda *matrix: _dequantize_on_gpu(_restored(*matrix[:5]), matrix[5]),
    formula=lambda *matrix: _restored(*matrix[:5]).dequantize(matrix[5]),
    shapes=lambda data, scale, fmt, width, pow2, dtype: data.new_empty(data.shape[0], width, dtype=dtype),
)
_quantize_messages = fused(
    "fp8_quantize_messages(Tensor x, Tensor(a!)? met) -> Tensor",
    gpu=lambda x, met: _message_on_gpu(x, met=met),
    formula=lambda x, met: pack_message(quantize(x, met=met)),
    shapes=lambda x, met: x.new_empty(x.shape[0], message_bytes(x.shape[1]), dtype=torch.uint8),
)
