"""Quantisation as torch operations: on a GPU one Triton kernel each, on a CPU the formulas of `quantize`.

To a dry run each is one operation with its inputs and results. Infinities and NaN set the flag `met` int32 `[1]` to 1,
where a flag is given: the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..kernels.op import fused
from ..kernels.swiglu import swiglu_backward_formula, swiglu_formula
from .message import message_bytes, pack_message
from .number_formats import find_format
from .quantize import BlockQuantized, quantize
from .tensor_formats import SIDE, FormatName
from .triton import RowGroups, group_rows, packs
from .triton import dequantize_rows as _dequantize_on_gpu
from .triton import quantize_both as _both_by_kernel
from .triton import quantize_for_dispatch as _message_on_gpu
from .triton import quantize_rows as _quantize_on_gpu
from .triton import requantize_columns as _requantize_by_kernel
from .triton import swiglu as _swiglu_on_gpu
from .triton import swiglu_backward as _swiglu_backward_on_gpu
from .triton import swiglu_keeping as _swiglu_keeping_on_gpu
from .triton import swiglu_quantize_columns as _swiglu_columns_by_kernel

_ROWS = (1, SIDE)


@cache
def _takes_kernels(device: torch.device) -> bool:
    """Whether a GPU converts to E4M3 itself, and Triton is there."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def has_kernel(device: torch.device, fmt: FormatName = "e4m3", width: int = SIDE) -> bool:
    """Whether one kernel of this device quantises rows of `width` values to `fmt`, and restores them."""
    if device.type == "cpu" or (device.type == "cuda" and not _takes_kernels(device)):
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


def swiglu_keeping(
    gate_up: Tensor, weights: Tensor | None, pow2_scales: bool, met: Tensor | None
) -> tuple[Tensor, BlockQuantized]:
    """`silu(gate) up weight` BF16 `[R, I]` of gate_up BF16 `[R, 2I]`, and gate_up in E4M3 with tiles of (1, 128).

    `weights` FP32 `[R]`, or None for 1.
    """
    hidden, data, scale = _swiglu_keeping(gate_up.detach().contiguous(), weights, pow2_scales, met)
    return hidden, _restored(data, scale, "e4m3", gate_up.shape[1], pow2_scales)


def swiglu_of(cache: BlockQuantized, weights: Tensor | None) -> Tensor:
    """`silu(gate) up weight` BF16 `[R, I]` of a cache that `swiglu_keeping` made, restored in BF16."""
    hidden: Tensor = _swiglu_of(cache.data, cache.scale, weights, cache.width, cache.pow2_scales)
    return hidden


def swiglu_backward_of(grad: Tensor, cache: BlockQuantized, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up BF16 `[R, 2I]`, and of `weights` FP32 `[R]`, of `swiglu_of` by `grad` BF16 `[R, I]`."""
    rest = cache.data, cache.scale, weights, cache.width, cache.pow2_scales
    made, grad_weights = _swiglu_backward_of(grad.contiguous(), *rest)
    return made, None if weights is None else grad_weights


def groups_on(device: torch.device, ends: Sequence[int] | None) -> RowGroups | None:
    """Groups of rows that end at these rows, for kernels of `device`."""
    return None if ends is None else group_rows(ends, device)


def quantize_both(
    x: Tensor, groups: RowGroups | None, pow2_scales: bool = True, met: Tensor | None = None
) -> tuple[BlockQuantized, BlockQuantized]:
    """x BF16 `[M, N]` in E4M3 in tiles of (1, 128), and of (128, 1) that begin again with each group of rows."""
    codes, scale, codes_t, scale_t = _quantize_both(x.detach().contiguous(), *_table(groups), pow2_scales, met)
    rows = _restored(codes, scale, "e4m3", x.shape[1], pow2_scales)
    return rows, _columns(codes_t, scale_t, x.shape[1], pow2_scales, groups)


def requantize_columns(x: BlockQuantized, groups: RowGroups | None, pow2_scales: bool) -> BlockQuantized:
    """x E4M3 in tiles of (1, 128), restored and quantised in tiles of (128, 1): `BlockQuantized.requantize`."""
    codes, scale = _requantize_columns(x.data, x.scale, x.width, x.pow2_scales, *_table(groups), pow2_scales)
    return _columns(codes, scale, x.width, pow2_scales, groups)


def swiglu_columns_of(
    cache: BlockQuantized, weights: Tensor | None, groups: RowGroups | None, pow2_scales: bool
) -> BlockQuantized:
    """`swiglu_of`, quantised to E4M3 in tiles of (128, 1)."""
    given = cache.data, cache.scale, weights, cache.width, cache.pow2_scales
    codes, scale = _swiglu_columns(*given, *_table(groups), pow2_scales)
    return _columns(codes, scale, cache.width // 2, pow2_scales, groups)


def _table(groups: RowGroups | None) -> tuple[Tensor | None, list[int] | None]:
    return (None, None) if groups is None else (groups.table, list(groups.ends))


def _groups(table: Tensor | None, ends: list[int] | None) -> RowGroups | None:
    return None if table is None or ends is None else RowGroups(tuple(ends), table)


def _columns(codes: Tensor, scale: Tensor, width: int, pow2: bool, groups: RowGroups | None) -> BlockQuantized:
    ends = None if groups is None else groups.ends
    return BlockQuantized(codes.mT, scale, (SIDE, 1), "e4m3", width, pow2, ends)


def _transposed(matrix: BlockQuantized) -> tuple[Tensor, Tensor]:
    return matrix.data.mT.contiguous(), matrix.scale


def _column_shapes(x: Tensor, width: int, table: Tensor | None) -> tuple[Tensor, Tensor]:
    down = -(-x.shape[0] // SIDE) if table is None else table.shape[0]
    codes = x.new_empty(width, x.shape[0], dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(down, width, dtype=torch.float32)


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


def _keep_formula(
    gate_up: Tensor, weights: Tensor | None, pow2: bool, met: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return swiglu_formula(gate_up, weights), *_tensors(quantize(gate_up, _ROWS, "e4m3", pow2, met=met))


def _keep_on_gpu(
    gate_up: Tensor, weights: Tensor | None, pow2: bool, met: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, cache = _swiglu_keeping_on_gpu(gate_up, weights, pow2, met)
    return hidden, cache.data, cache.scale


def _backward_on_gpu(
    grad: Tensor, data: Tensor, scale: Tensor, weights: Tensor | None, width: int, pow2: bool
) -> tuple[Tensor, Tensor]:
    made, grad_weights = _swiglu_backward_on_gpu(grad, _restored(data, scale, "e4m3", width, pow2), weights)
    return made, scale.new_empty(0) if grad_weights is None else grad_weights


def _backward_formula(
    grad: Tensor, data: Tensor, scale: Tensor, weights: Tensor | None, width: int, pow2: bool
) -> tuple[Tensor, Tensor]:
    gate_up = _restored(data, scale, "e4m3", width, pow2).dequantize(torch.bfloat16)
    made, grad_weights = swiglu_backward_formula(grad, gate_up, weights)
    return made, scale.new_empty(0) if grad_weights is None else grad_weights


def _keep_shapes(
    gate_up: Tensor, weights: Tensor | None, pow2: bool, met: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    return hidden, *_quantize_shapes(gate_up, "e4m3", pow2, met)


_swiglu_keeping = fused(
    "fp8_swiglu_keeping(Tensor gate_up, Tensor? weights, bool pow2, Tensor(a!)? met) -> (Tensor, Tensor, Tensor)",
    gpu=_keep_on_gpu,
    formula=_keep_formula,
    shapes=_keep_shapes,
)
_swiglu_of = fused(
    "fp8_swiglu(Tensor data, Tensor scale, Tensor? weights, int width, bool pow2) -> Tensor",
    gpu=lambda data, scale, weights, *how: _swiglu_on_gpu(_restored(data, scale, "e4m3", *how), weights),
    formula=lambda data, scale, weights, *how: swiglu_formula(
        _restored(data, scale, "e4m3", *how).dequantize(torch.bfloat16), weights
    ),
    shapes=lambda data, scale, weights, width, pow2: data.new_empty(data.shape[0], width // 2, dtype=torch.bfloat16),
)
_swiglu_backward_of = fused(
    "fp8_swiglu_backward(Tensor grad, Tensor data, Tensor scale, Tensor? weights, int width, bool pow2) "
    "-> (Tensor, Tensor)",
    gpu=_backward_on_gpu,
    formula=_backward_formula,
    shapes=lambda grad, data, scale, weights, width, pow2: (
        grad.new_empty(grad.shape[0], width),
        scale.new_empty(0 if weights is None else grad.shape[0]),
    ),
)


def _both_on_gpu(
    x: Tensor, table: Tensor | None, ends: list[int] | None, pow2: bool, met: Tensor | None
) -> tuple[Tensor, ...]:
    rows, columns = _both_by_kernel(x, _groups(table, ends), pow2, met)
    return *_tensors(rows), columns.data.mT, columns.scale


def _both_formula(
    x: Tensor, table: Tensor | None, ends: list[int] | None, pow2: bool, met: Tensor | None
) -> tuple[Tensor, ...]:
    columns = quantize(x, (SIDE, 1), pow2_scales=pow2, offsets=ends)
    return *_tensors(quantize(x, pow2_scales=pow2, met=met)), *_transposed(columns)


_quantize_both = fused(
    "fp8_quantize_both(Tensor x, Tensor? table, int[]? ends, bool pow2, Tensor(a!)? met) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    gpu=_both_on_gpu,
    formula=_both_formula,
    shapes=lambda x, table, ends, pow2, met: (
        *_quantize_shapes(x, "e4m3", pow2, met),
        *_column_shapes(x, x.shape[1], table),
    ),
)
_requantize_columns = fused(
    "fp8_requantize_columns(Tensor data, Tensor scale, int width, bool from_pow2, Tensor? table, int[]? ends, "
    "bool pow2) -> (Tensor, Tensor)",
    gpu=lambda data, scale, width, kind, table, ends, pow2: _transposed(
        _requantize_by_kernel(_restored(data, scale, "e4m3", width, kind), _groups(table, ends), pow2)
    ),
    formula=lambda data, scale, width, kind, table, ends, pow2: _transposed(
        _restored(data, scale, "e4m3", width, kind).requantize(pow2_scales=pow2, offsets=ends)
    ),
    shapes=lambda data, scale, width, kind, table, ends, pow2: _column_shapes(data, width, table),
)
_swiglu_columns = fused(
    "fp8_swiglu_columns(Tensor data, Tensor scale, Tensor? weights, int width, bool from_pow2, Tensor? table, "
    "int[]? ends, bool pow2) -> (Tensor, Tensor)",
    gpu=lambda data, scale, weights, width, kind, table, ends, pow2: _transposed(
        _swiglu_columns_by_kernel(_restored(data, scale, "e4m3", width, kind), weights, _groups(table, ends), pow2)
    ),
    formula=lambda data, scale, weights, width, kind, table, ends, pow2: _transposed(
        quantize(
            swiglu_formula(_restored(data, scale, "e4m3", width, kind).dequantize(torch.bfloat16), weights),
            (SIDE, 1),
            pow2_scales=pow2,
            offsets=ends,
        )
    ),
    shapes=lambda data, scale, weights, width, kind, table, ends, pow2: _column_shapes(data, width // 2, table),
)
