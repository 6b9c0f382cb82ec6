"""Groups of rows, and checks of arguments. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...settings import UsageError
from ..quantize import BlockQuantized
from ..tensor_formats import SIDE


@dataclass(frozen=True)
class RowGroups:
    """Groups of rows in which tiles of 128 rows begin again, with the table of tiles on the device.

    `ends` are the groups' row ends; `table` int32 `[tiles, 2]` has each tile's first row and the end of its rows.
    """

    ends: tuple[int, ...]
    table: Tensor


def group_rows(ends: Sequence[int] | Tensor, device: torch.device | str) -> RowGroups:
    """Groups that end at these rows, to be made once and used for all matrices with these rows.

    `ends` are in ascending order and not negative. With a tensor on a GPU the host waits for it. Raises UsageError for
    ends in another order.
    """
    ends = tuple(int(end) for end in (ends.tolist() if isinstance(ends, Tensor) else ends))
    starts = (0, *ends[:-1])
    if any(first > end for first, end in zip(starts, ends, strict=True)):
        raise UsageError(f"group ends {ends} fall: they rise from 0 to the number of rows")
    firsts = [
        torch.arange(first, end, SIDE, dtype=torch.int32) for first, end in zip(starts, ends, strict=True)
    ]  # fmt: skip
    counts = torch.tensor([part.numel() for part in firsts], dtype=torch.int64)
    first = torch.cat(firsts) if firsts else torch.empty(0, dtype=torch.int32)
    last = torch.tensor(ends, dtype=torch.int32).repeat_interleave(counts)
    return RowGroups(ends, torch.stack((first, torch.minimum(first + SIDE, last)), 1).to(device, non_blocking=True))


def tiles_down(rows: int, groups: RowGroups | None) -> int:
    """Tiles of 128 rows. Raises UsageError for groups of another number of rows."""
    if groups is None:
        return -(-rows // SIDE)
    if (groups.ends[-1] if groups.ends else 0) != rows:
        raise UsageError(f"groups that end at rows {groups.ends} do not divide a matrix of {rows} rows")
    return groups.table.shape[0]


def alignment(groups: RowGroups | None) -> int:
    """Alignment of groups that kernels may assume: 0 without groups, 16 if that divides all ends, else 1.

    A program writes 16 rows of transposed codes at once where it can, and single bytes elsewhere.
    """
    if groups is None:
        return 0
    return 1 if any(end % 16 for end in groups.ends) else 16


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """The tensor, once its type, shape and contiguous layout are checked. None in `shape` is any size.

    Raises UsageError, with the numbers, for another type, shape or layout.
    """
    fits = len(shape) == tensor.dim() and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise UsageError(f"{name} is {tensor.dtype} {list(tensor.shape)}, but {dtype} [{wanted_shape}] is needed")
    if not tensor.is_contiguous():
        raise UsageError(f"{name} {list(tensor.shape)} has strides {tensor.stride()}: call contiguous() on it first")
    return tensor.detach()


def check_rows_quantized(name: str, matrix: BlockQuantized) -> BlockQuantized:
    """A matrix in E4M3 with tiles of (1, 128). Raises UsageError for any other."""
    if matrix.tile != (1, SIDE) or matrix.fmt != "e4m3" or matrix.data.dim() != 2:
        raise UsageError(
            f"{name} has {matrix.fmt} in tiles of {matrix.tile} and shape {list(matrix.shape)}: "
            f"a matrix of e4m3 in tiles of {(1, SIDE)} is needed"
        )
    rows, width = matrix.shape
    check(f"{name}'s codes", matrix.data, torch.float8_e4m3fn, rows, width)
    check(f"{name}'s scales", matrix.scale, torch.float32, rows, -(-width // SIDE))
    return matrix


def same_device(**tensors: Tensor | None) -> torch.device:
    """The device of all tensors. Raises UsageError where they are on several devices."""
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        raise UsageError("tensors on several devices: " + ", ".join(f"{name} on {at}" for name, at in places.items()))
    return next(iter(places.values()))
