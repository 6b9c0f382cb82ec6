"""Public functions of the fused kernels: each checks, allocates and launches, and imports Triton only when called."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.launch import Launch
from ...settings import UsageError
from ..message import message_bytes, scale_start
from ..quantize import BlockQuantized
from ..tensor_formats import SIDE
from .launch import RowGroups, alignment, check, check_rows_quantized, same_device, tiles_down
from .rows import quantize_rows

_ROWS, _COLUMNS = (1, SIDE), (SIDE, 1)


def swiglu(gate_up: Tensor | BlockQuantized, weights: Tensor | None = None) -> Tensor:
    """`silu(gate) * up * weight`, BF16 `[R, I]`.

    Args:
        gate_up: `[R, 2I]`, gate first: BF16, or E4M3 in tiles of (1, 128) as it was cached, which is restored in BF16.
        weights: FP32 `[R]`, the gate weight of each row, or None for 1.

    Raises:
        UsageError: a shape, type or layout that is not the above, an odd width, or no Triton.
    """
    given = _check_gate_up(gate_up, weights)
    hidden = torch.empty(given.rows, given.inner, dtype=torch.bfloat16, device=given.device)
    _swiglu_rows(given, hidden, (hidden, hidden), None, {"keep": False, "pow2": True})
    return hidden


def swiglu_keeping(
    gate_up: Tensor, weights: Tensor | None = None, pow2_scales: bool = True, met: Tensor | None = None
) -> tuple[Tensor, BlockQuantized]:
    """`swiglu` of gate_up BF16, and gate_up `[R, 2I]` in tiles of (1, 128), from one read where 128 divides I.

    Infinities and NaN in gate_up set `met` int32 `[1]` to 1.
    """
    given = _check_gate_up(gate_up, weights)
    if given.inner % SIDE:
        return swiglu(gate_up, weights), quantize_rows(gate_up, "e4m3", pow2_scales, met)
    hidden = torch.empty(given.rows, given.inner, dtype=torch.bfloat16, device=given.device)
    codes, scales = _empty_rows(given.rows, 2 * given.inner, given.device)
    _swiglu_rows(given, hidden, (codes, scales), met, {"keep": True, "pow2": pow2_scales})
    return hidden, BlockQuantized(codes, scales, _ROWS, "e4m3", 2 * given.inner, pow2_scales)


def _swiglu_rows(
    given: _GateUp, hidden: Tensor, cache: tuple[Tensor, Tensor], met: Tensor | None, constants: dict[str, Any]
) -> None:
    same_device(hidden=hidden, met=met)
    tiles, block = -(-given.inner // SIDE), 16
    from .swiglu_kernels import swiglu_rows

    Launch(
        swiglu_rows,
        -(-given.rows // block) * tiles,
        (
            *(*given.pointers, hidden, *cache, hidden if met is None else met),
            *(given.rows, given.inner, given.cache_tiles, tiles),
        ),
        {**given.constants, **constants, "watched": met is not None, "block": block},
        num_warps=4,
    ).run()


def swiglu_quantize_columns(
    gate_up: Tensor | BlockQuantized,
    weights: Tensor | None = None,
    groups: RowGroups | None = None,
    pow2_scales: bool = True,
) -> BlockQuantized:
    """The values of `swiglu` in tiles of (128, 1), transposed: the input of W of the linear that follows.

    Recomputed from gate and up, so that the values need not be kept (V3 §3.2.3). Arguments and errors as in `swiglu`.
    """
    given = _check_gate_up(gate_up, weights)
    block = 64
    down, across = tiles_down(given.rows, groups), -(-given.inner // block)
    codes, scales = _empty_columns(given.rows, given.inner, down, given.device)
    from .swiglu_kernels import swiglu_columns

    Launch(
        swiglu_columns,
        down * across,
        (*given.pointers, _table(groups, codes), codes, scales, given.rows, given.inner, given.cache_tiles, across),
        {**given.constants, "groups": alignment(groups), "pow2": pow2_scales, "block": block},
        num_warps=16,
    ).run()
    return _columns(codes, scales, given.inner, pow2_scales, groups)


def swiglu_backward(
    grad: Tensor, gate_up: Tensor | BlockQuantized, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The backward of `swiglu`.

    Args:
        grad: BF16 `[R, I]`; the rest as in `swiglu`.

    Returns:
        The gradient of gate and up BF16 `[R, 2I]`, and the gradient of the weights FP32 `[R]`, or None.
    """
    given = _check_gate_up(gate_up, weights)
    rows, inner = given.rows, given.inner
    grad = check("grad", grad, torch.bfloat16, rows, inner)
    same_device(gate_up=given.pointers[0], grad=grad)
    made = torch.empty(rows, 2 * inner, dtype=torch.bfloat16, device=given.device)
    grad_weights = None if weights is None else torch.empty(rows, dtype=torch.float32, device=given.device)
    block = 8
    from .swiglu_kernels import swiglu_backward as kernel

    Launch(
        kernel,
        -(-rows // block),
        (
            *(grad, *given.pointers, made, made if grad_weights is None else grad_weights),
            *(rows, inner, given.cache_tiles, -(-inner // SIDE)),
        ),
        {**given.constants, "block": block},
        num_warps=4,
    ).run()
    return made, grad_weights


def quantize_both(
    x: Tensor, groups: RowGroups | None = None, pow2_scales: bool = True, met: Tensor | None = None
) -> tuple[BlockQuantized, BlockQuantized]:
    """x BF16 `[M, N]` in tiles of (1, 128), and in tiles of (128, 1), transposed, from one read.

    Infinities and NaN set `met` int32 `[1]` to 1. Raises UsageError for another shape, type or layout, and without
    Triton.
    """
    x = check("x", x, torch.bfloat16, None, None)
    rows, width = x.shape
    down, across = tiles_down(rows, groups), -(-width // SIDE)
    codes, scales = _empty_rows(rows, width, x.device)
    codes_t, scales_t = _empty_columns(rows, width, down, x.device)
    # Where 16 codes are not contiguous, every code has its own address in registers.
    block = 16 if rows % 16 or width % 16 or alignment(groups) == 1 else 32
    from .transpose_kernels import quantize_both as kernel

    Launch(
        kernel,
        down * across,
        (
            *(x, _table(groups, codes), codes, scales, codes_t, scales_t, scales if met is None else met),
            *(rows, width, across),
        ),
        {"groups": alignment(groups), "pow2": pow2_scales, "watched": met is not None, "block": block},
        num_warps=8,
    ).run()
    return (
        BlockQuantized(codes, scales, _ROWS, "e4m3", width, pow2_scales),
        _columns(codes_t, scales_t, width, pow2_scales, groups),
    )


def requantize_columns(
    x: BlockQuantized, groups: RowGroups | None = None, pow2_scales: bool | None = None
) -> BlockQuantized:
    """x `[M, N]` E4M3 in tiles of (1, 128), in tiles of (128, 1) and transposed: as `BlockQuantized.requantize`.

    The kind of scales stays unless it is given. Raises UsageError for other tiles or formats, and without Triton.
    """
    x = check_rows_quantized("x", x)
    rows, width = x.shape
    kind = x.pow2_scales if pow2_scales is None else pow2_scales
    block = 64
    down = tiles_down(rows, groups)
    codes, scales = _empty_columns(rows, width, down, x.data.device)
    from .transpose_kernels import requantize_columns as kernel

    Launch(
        kernel,
        down * -(-width // block),
        (x.data, x.scale, _table(groups, codes), codes, scales, rows, width, x.scale.shape[1]),
        {"groups": alignment(groups), "from_pow2": x.pow2_scales, "pow2": kind, "block": block},
        num_warps=16,
    ).run()
    return _columns(codes, scales, width, kind, groups)


def quantize_for_dispatch(
    x: Tensor,
    row_of_slot: Tensor | None = None,
    num_rows: int | None = None,
    pow2_scales: bool = True,
    met: Tensor | None = None,
) -> Tensor:
    """Quantise each token once, in tiles of (1, 128), and write it to all its rows of the buffer that dispatch sends.

    Args:
        x: BF16 `[T, H]`.
        row_of_slot: int32 or int64 `[T, K]`, the row of each choice of a token, each below `num_rows` and no row
            twice (`ExpertOrder.row_of_slot`); negative where there is none. Rows that no slot names are not written.
            None gives one row per token, in order.
        met: int32 `[1]`, set to 1 where x has infinities or NaN.

    Returns:
        uint8 `[num_rows, message_bytes(H)]`: the layout is in `fp8/message.py`, and `unpack_message` reads it.

    Raises:
        UsageError: another shape, type or layout, or no Triton.
    """
    x = check("x", x, torch.bfloat16, None, None)
    tokens, width = x.shape
    slots = None if row_of_slot is None else _check_slots("row_of_slot", row_of_slot, tokens, None)
    device = same_device(x=x, row_of_slot=slots, met=met)
    tiles, size = -(-width // SIDE), message_bytes(width)
    padded = size != width + 4 * tiles
    rows = tokens if num_rows is None else num_rows
    message = (torch.zeros if padded else torch.empty)(rows, size, dtype=torch.uint8, device=device)
    block = 8
    parts = -(-tiles // block)
    scales = message.view(torch.float32)
    from .permute_kernels import quantize_to_rows

    Launch(
        quantize_to_rows,
        tokens * parts,
        (
            *(x, x if slots is None else slots, message, scales, scales if met is None else met),
            *(width, tiles, parts, size, scale_start(width) // 4),
        ),
        {
            "top_k": 0 if slots is None else slots.shape[1],
            "pow2": pow2_scales,
            "watched": met is not None,
            "block": block,
        },
        num_warps=2,
    ).run()
    return message


class _GateUp(NamedTuple):
    """Gate and up as the kernels take them."""

    rows: int
    inner: int  # I
    cache_tiles: int  # tiles across of cached codes
    pointers: tuple[Tensor, Tensor, Tensor]  # values or codes, scales, weights; any tensor in place of a missing one
    constants: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.pointers[0].device


def _check_gate_up(gate_up: Tensor | BlockQuantized, weights: Tensor | None) -> _GateUp:
    cached = isinstance(gate_up, BlockQuantized)
    if isinstance(gate_up, BlockQuantized):
        gate_up = check_rows_quantized("gate_up", gate_up)
        values, scales = gate_up.data, gate_up.scale
    else:
        values = scales = check("gate_up", gate_up, torch.bfloat16, None, None)
    rows, width = values.shape
    if width % 2:
        raise UsageError(f"gate_up has {width} columns, which is odd: gate and up have as many each")
    if weights is not None:
        weights = check("weights", weights, torch.float32, rows)
    same_device(gate_up=values, scales=scales, weights=weights)
    inner = width // 2
    constants = {"cached": cached, "even": inner % SIDE == 0, "weighted": weights is not None}
    return _GateUp(
        rows, inner, -(-width // SIDE), (values, scales, values if weights is None else weights), constants
    )  # fmt: skip


def _check_slots(name: str, slots: Tensor, *shape: int | None) -> Tensor:
    return check(name, slots, torch.int32 if slots.dtype == torch.int32 else torch.int64, *shape)


def _empty_rows(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(rows, -(-width // SIDE), dtype=torch.float32, device=device)


def _empty_columns(rows: int, width: int, down: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.empty(width, rows, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(down, width, dtype=torch.float32, device=device)


def _table(groups: RowGroups | None, unused: Tensor) -> Tensor:
    if groups is None:
        return unused
    same_device(groups=groups.table, result=unused)
    return groups.table


def _columns(codes: Tensor, scales: Tensor, width: int, pow2: bool, groups: RowGroups | None) -> BlockQuantized:
    ends = None if groups is None else groups.ends
    return BlockQuantized(codes.mT, scales, _COLUMNS, "e4m3", width, pow2, ends)
