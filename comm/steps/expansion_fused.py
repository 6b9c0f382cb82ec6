"""Expansion of the tokens that arrived into rows of this rank's experts by fused kernels; see `comm/expand.py`."""

from __future__ import annotations

from torch import Tensor

from ...kernels.routes.index import Arrivals, expand_tokens
from ...kernels.routes.rows import gather_rows, pick_numbers, sum_copies


class FusedExpansion:
    """Map between the tokens, in the order of arrival, and the rows of this rank's experts.

    Args:
        arrivals: the tokens that arrived, A of them.
        rows_per_expert: rows of each expert, on the host.
        first: number of this rank's first expert.
        alignment: see `comm/align.py: Aligned`.
    """

    def __init__(self, arrivals: Arrivals, rows_per_expert: list[int], first: int, alignment: int) -> None:
        self.tokens_per_expert = [-(-rows // alignment) * alignment for rows in rows_per_expert]
        """Rows of each expert, rows of zeros included."""
        made = expand_tokens(*arrivals, first, alignment, sum(self.tokens_per_expert))
        self._arrival_of_row, self.row_weights, self._row_of_slot, self.offsets = made

    def rows(self, arrived: Tensor) -> Tensor:
        """Rows of the experts [R, ...] from a matrix with one row per arrival."""
        return gather_rows(arrived, self._arrival_of_row)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum of each token's rows, by slot: [R, H] -> [A, H]."""
        return sum_copies(rows if rows.stride(-1) == 1 else rows.contiguous(), self._row_of_slot)

    def slots(self, weights: Tensor) -> Tensor:
        """Numbers per slot [A, K] from one number per row [R], zero where the expert is on another rank."""
        return pick_numbers(weights, self._row_of_slot)
