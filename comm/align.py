"""Rows sorted by expert, each expert's filled up with zeros to a multiple of what its matrix products want."""

from __future__ import annotations

import torch
from torch import Tensor


class Aligned:
    """Where rows sorted by expert lie when each expert's are filled up; with a unit of 1, where they lay before.

    Args:
        counts: int64 [E], rows of each expert.
        on_host: the same as a list.
        unit: each expert's rows become a multiple of it.
    """

    def __init__(self, counts: Tensor, on_host: list[int], unit: int) -> None:
        self.rows = sum(on_host)
        self.tokens_per_expert = [-(-count // unit) * unit for count in on_host]
        """Rows of each expert, those of zeros included."""
        short = -counts % unit
        ends, wide_ends = counts.cumsum(0), (counts + short).cumsum(0)
        self.offsets = wide_ends.to(torch.int32)
        """int32 [E], where each expert's rows end."""
        self.place: Tensor | None = None
        """int64 [rows], where each row lies now; None if where it was."""
        self._padding: Tensor | None = None
        if unit == 1:
            return
        wide = sum(self.tokens_per_expert)
        row = torch.arange(self.rows, device=counts.device)
        self.place = row + (wide_ends - short - ends)[torch.searchsorted(ends, row, right=True)]
        first = wide_ends - short - (short.cumsum(0) - short)  # of the padding, less that of the experts before
        first = torch.repeat_interleave(first, short, output_size=wide - self.rows)
        self._padding = first + torch.arange(wide - self.rows, device=counts.device)

    def gather(self, source: Tensor, index: Tensor | None) -> Tensor:
        """Row `index[i]` of `source` at the place of row i, zeros elsewhere; index int64 [rows], None for i itself."""
        if self.place is None:
            return source if index is None else source.index_select(0, index)
        assert self._padding is not None
        if index is None:
            index = torch.arange(self.rows, device=source.device)
        wide = index.new_zeros(sum(self.tokens_per_expert)).index_copy_(0, self.place, index)
        return source.index_select(0, wide).index_fill_(0, self._padding, 0)

    def places(self, index: Tensor | None) -> Tensor | None:
        """Where the rows `index` lie now; None for every row in order."""
        if self.place is None:
            return index
        return self.place if index is None else self.place.index_select(0, index)
