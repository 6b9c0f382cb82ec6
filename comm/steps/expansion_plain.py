"""Expansion of the tokens that arrived by torch's operations; `expansion_fused.py` does the same by fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routes.index import Arrivals
from ..expand import Expansion


class PlainExpansion:
    """Map between the tokens of one source, in the order of arrival, and the rows of this rank's experts.

    Arguments and methods are those of `FusedExpansion`.
    """

    def __init__(self, arrivals: Arrivals, rows_per_expert: list[int], first: int, alignment: int) -> None:
        assert len(arrivals.counts) == 1, "the tokens of one source"
        self._moved = arrivals.moved
        ids, weights = arrivals.ids - first, arrivals.weights
        if self._moved is not None:
            ids, weights = ids.index_select(0, self._moved), weights.index_select(0, self._moved)
        ids = ids.masked_fill((ids < 0) | (ids >= len(rows_per_expert)), -1)
        self._expansion = Expansion(ids, arrivals.counts[0], rows_per_expert, alignment, self._moved)
        aligned = self._expansion.aligned
        self.tokens_per_expert, self.offsets = aligned.tokens_per_expert, aligned.offsets
        self.row_weights = self._expansion.weights(weights)

    def rows(self, arrived: Tensor) -> Tensor:
        return self._expansion.rows(arrived)

    def sum(self, rows: Tensor) -> Tensor:
        return self._by_arrival(self._expansion.sum(rows))

    def slots(self, weights: Tensor) -> Tensor:
        return self._by_arrival(self._expansion.slots(weights))

    def _by_arrival(self, rows: Tensor) -> Tensor:
        """Rows in the order of arrival, from the order of (source rank, token)."""
        if self._moved is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self._moved, rows)
