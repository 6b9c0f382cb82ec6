"""Moves and sums of rows by position, as torch operations of one kernel each.

Positions and indices are int32, and -1 stands for none. A or R rows, H their width, K or B positions of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import Launch
from ..op import fused
from .index import power_of_two

COLUMNS_AT_ONCE = 1024
"""Columns that a program moves at once."""
ALIGNMENT = 16
"""Bytes of which the size of a message is a multiple, so that kernels move 16 bytes at a time."""


def _step(itemsize: int, *sizes: int) -> int:
    """Numbers in 16 bytes, if all sizes are multiples of it; else 1."""
    step = max(ALIGNMENT // itemsize, 1)
    return 1 if any(size % step for size in sizes) else step


def _grid(rows: int, width: int) -> tuple[int, int, int]:
    """Programs, parts of a row, and columns of a part."""
    block = min(COLUMNS_AT_ONCE, power_of_two(width))
    parts = -(-width // block)
    return rows * parts, parts, block


# spread_rows


def _spread_rows(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    from .rows_kernels import spread_rows as kernel

    out = _spread_rows_shapes(rows, positions, count)
    programs, parts, block = _grid(*rows.shape)
    step = _step(rows.element_size(), rows.stride(0), rows.shape[1])
    Launch(
        kernel,
        programs,
        (rows, positions, out, rows.stride(0) // step, rows.shape[1] // step, parts),
        {"step": step, "copies": positions.shape[1], "block": block},
        num_warps=4,
    ).run()
    return out


def _spread_rows_formula(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    row, copy = (positions >= 0).nonzero(as_tuple=True)
    return _spread_rows_shapes(rows, positions, count).index_copy_(0, positions[row, copy].long(), rows[row])


def _spread_rows_shapes(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    return torch.empty(count, rows.shape[1], dtype=rows.dtype, device=rows.device)


spread_rows = fused(
    "spread_rows(Tensor rows, Tensor positions, int count) -> Tensor",
    _spread_rows,
    _spread_rows_formula,
    _spread_rows_shapes,
)
"""Copies `[count, H]` of rows `[A, H]`, row a at each of `positions[a]` `[A, B]`: each is read once.

Every position from 0 to count - 1 occurs once.
"""

# spread_messages


def message_ends(end: int, top_k: int, id_type: torch.dtype) -> tuple[int, int, int, int]:
    """Ends in bytes of a message's payload, of its filling up to a multiple of 4, of its weights and of its ids."""
    start = -(-end // 4) * 4
    return end, start, start + 4 * top_k, start + (4 + id_type.itemsize) * top_k


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()


def _spread_messages(
    payload: Tensor, weights: Tensor, ids: Tensor, positions: Tensor, count: int, id_type: torch.dtype
) -> Tensor:
    from .rows_kernels import spread_messages as kernel

    out = _spread_messages_shapes(payload, weights, ids, positions, count, id_type)
    _, start, ids_start, _ = message_ends(_row_bytes(payload), ids.shape[1], id_type)
    programs, parts, block = _grid(*payload.shape)
    views = out.view(payload.dtype), out.view(torch.float32), out.view(id_type)
    sizes = payload.stride(0), payload.shape[1], views[0].shape[1]
    step = _step(payload.element_size(), *sizes)
    stride, width, out_width = (size // step for size in sizes)
    numbers = stride, width, parts, out_width, views[1].shape[1], views[2].shape[1]
    constants = {"top_k": ids.shape[1], "slots": power_of_two(ids.shape[1]), "copies": positions.shape[1]}
    Launch(
        kernel,
        programs,
        (payload, weights.contiguous(), ids.contiguous(), positions, *views, *numbers, start // 4,
         ids_start // id_type.itemsize),
        {"step": step, **constants, "block": block},
        num_warps=4,
    ).run()  # fmt: skip
    return out


def _spread_messages_formula(
    payload: Tensor, weights: Tensor, ids: Tensor, positions: Tensor, count: int, id_type: torch.dtype
) -> Tensor:
    end, start, ids_start, ids_end = message_ends(_row_bytes(payload), ids.shape[1], id_type)
    size = -(-ids_end // ALIGNMENT) * ALIGNMENT
    messages = torch.zeros(payload.shape[0], size, dtype=torch.uint8)
    messages[:, :end] = payload.contiguous().view(torch.uint8)
    messages[:, start:ids_start] = weights.contiguous().view(torch.uint8)
    messages[:, ids_start:ids_end] = ids.to(id_type).view(torch.uint8)
    return _spread_rows_formula(messages, positions, count)


def _spread_messages_shapes(
    payload: Tensor, weights: Tensor, ids: Tensor, positions: Tensor, count: int, id_type: torch.dtype
) -> Tensor:
    size = -(-message_ends(_row_bytes(payload), ids.shape[1], id_type)[3] // ALIGNMENT) * ALIGNMENT
    return torch.empty(count, size, dtype=torch.uint8, device=payload.device)


spread_messages = fused(
    "spread_messages(Tensor payload, Tensor weights, Tensor ids, Tensor positions, int count, ScalarType id_type) "
    "-> Tensor",
    _spread_messages,
    _spread_messages_formula,
    _spread_messages_shapes,
)
"""Messages uint8 `[count, bytes]`: each row's payload, its FP32 weights and its ids in `id_type`, as `message_ends`
says, at each of its positions. bytes is a multiple of ALIGNMENT; what lies between the parts is not defined.

payload: `[A, H]` of any type; weights: FP32 `[A, K]`; ids: int64 `[A, K]`; positions: as in `spread_rows`.
"""

# gather_rows


def _gather_rows(source: Tensor, index: Tensor) -> Tensor:
    from .rows_kernels import gather_rows as kernel

    out = _gather_rows_shapes(source, index)
    programs, parts, block = _grid(*out.shape)
    step = _step(source.element_size(), source.stride(0), source.shape[1])
    Launch(
        kernel,
        programs,
        (source, index, out, source.stride(0) // step, source.shape[1] // step, parts),
        {"step": step, "block": block},
        num_warps=4,
    ).run()
    return out


def _gather_rows_formula(source: Tensor, index: Tensor) -> Tensor:
    out = source.new_zeros(index.numel(), source.shape[1])
    out[index >= 0] = source[index[index >= 0].long()]
    return out


def _gather_rows_shapes(source: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.numel(), source.shape[1], dtype=source.dtype, device=source.device)


gather_rows = fused(
    "gather_rows(Tensor source, Tensor index) -> Tensor", _gather_rows, _gather_rows_formula, _gather_rows_shapes
)
"""Rows `[R, H]` of `source` `[A, H]`, with any stride between its rows: row `index[r]` for r, and zeros for -1."""

# sum_copies


def _sum_copies(rows: Tensor, positions: Tensor) -> Tensor:
    from .rows_kernels import sum_copies as kernel

    out = _sum_copies_shapes(rows, positions)
    programs, parts, block = _grid(*out.shape)
    step = _step(rows.element_size(), rows.stride(0), rows.shape[1])
    Launch(
        kernel,
        programs,
        (rows, positions, out, rows.stride(0) // step, rows.shape[1] // step, parts),
        {"step": step, "copies": positions.shape[1], "block": block},
        num_warps=4,
    ).run()
    return out


def _sum_copies_formula(rows: Tensor, positions: Tensor) -> Tensor:
    total = torch.zeros(positions.shape[0], rows.shape[1])
    for copy in positions.unbind(1):
        total[copy >= 0] += rows[copy[copy >= 0].long()].float()
    return total.to(rows.dtype)


def _sum_copies_shapes(rows: Tensor, positions: Tensor) -> Tensor:
    return torch.empty(positions.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)


sum_copies = fused(
    "sum_copies(Tensor rows, Tensor positions) -> Tensor", _sum_copies, _sum_copies_formula, _sum_copies_shapes
)
"""Sums `[A, H]` of the rows `[R, H]` at each of `positions[a]` `[A, B]`, in their order, none for -1.

An FP32 accumulator starts at +0 and takes one row after another; the total is rounded once, to nearest even.
"""

# put_numbers, pick_numbers


def _put_numbers(values: Tensor, positions: Tensor, count: int) -> Tensor:
    from .rows_kernels import put_numbers as kernel

    out = _put_numbers_shapes(values, positions, count)
    _each(kernel, values.contiguous(), positions, out, positions.numel())
    return out


def _put_numbers_formula(values: Tensor, positions: Tensor, count: int) -> Tensor:
    wanted = positions >= 0
    return _put_numbers_shapes(values, positions, count).index_copy_(0, positions[wanted].long(), values[wanted])


def _put_numbers_shapes(values: Tensor, positions: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=values.dtype, device=values.device)


put_numbers = fused(
    "put_numbers(Tensor values, Tensor positions, int count) -> Tensor",
    _put_numbers,
    _put_numbers_formula,
    _put_numbers_shapes,
)
"""Numbers `[count]`: each of `values` at its position, both of one shape. Positions are as in `spread_rows`."""


def _pick_numbers(values: Tensor, positions: Tensor) -> Tensor:
    from .rows_kernels import pick_numbers as kernel

    out = _pick_numbers_shapes(values, positions)
    _each(kernel, values.contiguous(), positions, out, positions.numel())
    return out


def _pick_numbers_formula(values: Tensor, positions: Tensor) -> Tensor:
    out = torch.zeros(positions.shape, dtype=values.dtype)
    out[positions >= 0] = values[positions[positions >= 0].long()]
    return out


def _pick_numbers_shapes(values: Tensor, positions: Tensor) -> Tensor:
    return torch.empty(positions.shape, dtype=values.dtype, device=values.device)


pick_numbers = fused(
    "pick_numbers(Tensor values, Tensor positions) -> Tensor",
    _pick_numbers,
    _pick_numbers_formula,
    _pick_numbers_shapes,
)
"""Numbers of `values` `[R]` at `positions`, in their shape, and 0 for -1."""


def _each(kernel: object, values: Tensor, positions: Tensor, out: Tensor, number: int) -> None:
    block = 1024
    Launch(kernel, -(-number // block), (values, positions, out, number), {"block": block}, num_warps=4).run()
