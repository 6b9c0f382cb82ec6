"""Launches that quantise rows along their columns, and restore them from codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.launch import Launch
from ...settings import UsageError
from ..number_formats import find_format
from ..quantize import BlockQuantized
from ..tensor_formats import SIDE, FormatName
from .launch import check, same_device

_BLOCK = 16  # rows of a program


def packs(width: int) -> bool:
    """Whether `quantize_rows` makes E5M6 of rows of this width: each half of the columns is a number of whole tiles."""
    return width % (2 * SIDE) == 0


def quantize_rows(
    x: Tensor, fmt: FormatName = "e4m3", pow2_scales: bool = True, met: Tensor | None = None
) -> BlockQuantized:
    """x `[M, N]`, BF16 or FP32, in tiles of (1, 128), E4M3 or E5M6. Infinities and NaN set `met` int32 `[1]` to 1.

    Raises UsageError for another shape, type or layout, another format, a width that does not pack, and without Triton.
    """
    x = check("x", x, torch.float32 if x.dtype == torch.float32 else torch.bfloat16, None, None)
    rows, width = x.shape
    if fmt not in ("e4m3", "e5m6") or (fmt == "e5m6" and not packs(width)):
        raise UsageError(f"rows of {width} values have no kernel for {fmt}")
    tiles, packed = -(-width // SIDE), fmt == "e5m6"
    found = find_format(fmt)
    codes = torch.empty(rows, found.bytes_per_row(width), dtype=found.dtype, device=x.device)
    scales = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    same_device(x=x, met=met)
    from .row_kernels import pack_rows
    from .row_kernels import quantize_rows as plain

    Launch(
        pack_rows if packed else plain,
        -(-rows // _BLOCK) * (tiles // 2 if packed else tiles),
        (x, codes, scales, scales if met is None else met, rows, width // 2 if packed else width, tiles),
        {"pow2": pow2_scales, "largest": torch.finfo(x.dtype).max, "watched": met is not None, "block": _BLOCK},
        num_warps=4,
    ).run()
    return BlockQuantized(codes, scales, (1, SIDE), fmt, width, pow2_scales)


def dequantize_rows(matrix: BlockQuantized, dtype: torch.dtype) -> Tensor:
    """The values `[M, N]` of a matrix in tiles of (1, 128), E4M3 or E5M6: BF16 or FP32.

    Its rows of codes and scales may begin every so many elements, as in messages. Raises UsageError for other tiles,
    formats or layouts, and without Triton.
    """
    codes, scales, (rows, width) = matrix.data, matrix.scale, matrix.shape
    contiguous = codes.stride(1) == scales.stride(1) == 1 or not matrix.data.numel()
    if matrix.tile != (1, SIDE) or matrix.fmt not in ("e4m3", "e5m6") or not contiguous:
        raise UsageError(
            f"{matrix.fmt} in tiles of {matrix.tile} with strides {codes.stride()} is not restored by rows"
        )
    out = torch.empty(rows, width, dtype=dtype, device=codes.device)
    tiles = scales.shape[1]
    from .row_kernels import dequantize_rows as kernel

    Launch(
        kernel,
        -(-rows // _BLOCK) * tiles,
        (codes, scales, out, rows, width, codes.stride(0), scales.stride(0), tiles, (width + 1) // 2),
        {"packed": matrix.fmt == "e5m6", "even": packs(width), "block": _BLOCK},
        num_warps=4,
    ).run()
    return out
