"""Rows sorted by expert. Zeros fill up each expert's rows to the multiple that its matrix products need."""

from __future__ import annotations

import torch
from torch import Tensor


class Aligned:
    """Positions that rows sorted by expert have after each expert's rows are filled up. A unit of 1 moves no row.

    Args:
        counts: int64 [E], rows of each expert.
        on_host: `counts` as a list on the host.
        unit: multiple to which the number of each expert's rows is raised.
    """

    def __init__(self, counts: Tensor, on_host: list[int], unit: int) -> None:
        self.rows = sum(on_host)
        self.tokens_per_expert = [-(-count // unit) * unit for count in on_host]
        """Rows of each expert, rows of zeros included."""
        short = -counts % unit
        ends, wide_ends = counts.cumsum(0), (counts + short).cumsum(0)
        self.offsets = wide_ends.to(torch.int32)
        """int32 [E], end of each expert's rows."""
        self.position: Tensor | None = None
        """int64 [rows], position of each row; None if no row moves."""
        self._padding: Tensor | None = None
        if unit == 1:
            return
        wide = sum(self.tokens_per_expert)
        row = torch.arange(self.rows, device=counts.device)
        self.position = row + (wide_ends - short - ends)[torch.searchsorted(ends, row, right=True)]
        first = wide_ends - short - (short.cumsum(0) - short)  # of each expert's padding, less all padding before it
        first = torch.repeat_interleave(first, short, output_size=wide - self.rows)
        self._padding = first + torch.arange(wide - self.rows, device=counts.device)

    def gather(self, source: Tensor, index: Tensor | None) -> Tensor:
        """Row `index[i]` of `source` at the position of row i, zeros elsewhere; index int64 [rows], None for i."""
        if self.position is None:
            return source if index is None else source.index_select(0, index)
        assert self._padding is not None
        if index is None:
            index = torch.arange(self.rows, device=source.device)
        wide = index.new_zeros(sum(self.tokens_per_expert)).index_copy_(0, self.position, index)
        return source.index_select(0, wide).index_fill_(0, self._padding, 0)

    def positions(self, index: Tensor | None) -> Tensor | None:
        """Positions of the rows `index`; None, given or returned, is every row in order."""
        if self.position is None:
            return index
        return self.position if index is None else self.position.index_select(0, index)
