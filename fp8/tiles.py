"""Tiles of a matrix, and a walk over them in pieces that stay in a CPU's cache.

A tile is (1, 128), (128, 1) or (128, 128) elements; the last one of a row or column may be partial. Rows come in
segments (one by default), and tiles of 128 rows begin again with each segment: the experts of a grouped matrix share no
tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import UsageError
from .tensor_formats import SIDE, Tile

TILES: tuple[Tile, ...] = ((1, SIDE), (SIDE, 1), (SIDE, SIDE))
# Elements per thread: FP32 temporaries of 2 MiB. Smaller ones cost calls and barriers, larger ones leave the cache.
PIECE_ELEMENTS = 2**19


class Piece(NamedTuple):
    """Equal tiles next to each other: their rows and columns in the matrix, and in its scales."""

    rows: slice
    columns: slice
    scale_rows: slice
    scale_columns: slice
    tile: Tile  # smaller than the matrix's tile where this is its edge

    def of(self, matrix: Tensor) -> Tensor:
        """This piece of a matrix as `[tiles down, tile rows, tiles across, tile columns]`, a view."""
        return matrix[self.rows, self.columns].unflatten(1, (-1, self.tile[1])).unflatten(0, (-1, self.tile[0]))

    def of_scales(self, scales: Tensor) -> Tensor:
        """The scales of this piece as `[tiles down, 1, tiles across, 1]`, a view that fits the result of `of`."""
        return scales[self.scale_rows, self.scale_columns, None].unsqueeze(1)


def check_tile(tile: Tile) -> Tile:
    """Return the tile. Raises UsageError for a tile that is none of the three."""
    if tuple(tile) not in TILES:
        raise UsageError(f"a tile of {tuple(tile)} is not supported: take (1, 128), (128, 1) or (128, 128)")
    return tile[0], tile[1]


def scale_shape(rows: Sequence[int], columns: int, tile: Tile) -> tuple[int, int]:
    """Scales down and across of a matrix whose segments have `rows` rows."""
    return sum(-(-count // tile[0]) for count in rows), -(-columns // tile[1])


def pieces(rows: Sequence[int], columns: int, tile: Tile, device: torch.device) -> Iterator[Piece]:
    """The pieces that cover a matrix with segments of these rows, top to bottom.

    On a CPU a piece has about PIECE_ELEMENTS elements per thread, elsewhere as many as possible. Empty segments have no
    pieces.
    """
    if tile[0] == 1:  # tiles of one row are the same wherever segments end
        rows = (sum(rows),)
    whole = device.type != "cpu"
    most = PIECE_ELEMENTS * torch.get_num_threads()
    down = max(1, most // max(1, columns) // tile[0]) * tile[0]
    first = first_scale = 0
    for count in rows:
        for start, stop, height in _runs(count, tile[0], count if whole else down):
            scale_rows = slice(first_scale + start // tile[0], first_scale + -(-stop // tile[0]))
            for left, right, width in _runs(columns, tile[1], columns):
                across = slice(left // tile[1], -(-right // tile[1]))
                yield Piece(slice(first + start, first + stop), slice(left, right), scale_rows, across, (height, width))
        first += count
        first_scale += -(-count // tile[0])


def _runs(count: int, side: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and side of runs of whole tiles, of up to `most` elements, then of what is left."""
    even = count - count % side
    step = max(most - most % side, side)
    for start in range(0, even, step):
        yield start, min(start + step, even), side
    if even < count:
        yield even, count, count - even
