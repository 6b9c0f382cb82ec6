"""Expansion on the experts' rank: one row per token that arrived becomes one row per expert of the token, and back.

A tokens that arrived at this rank, K top-k, E_local experts of this rank, R rows of `Dispatched`.
"""

from __future__ import annotations

from torch import Tensor

from .align import Aligned
from .permute import Choice, order_by_expert


class Expansion:
    """Map between the tokens that arrived and the rows of this rank's experts.

    Args:
        local_ids: int64 [A, K], experts of this rank by their local number, -1 for experts of other ranks. Rows of
            an expert come in the order of the tokens.
        counts, on_host: rows of each expert, as int64 [E_local] and as a list on the host.
        alignment: see `Aligned`.
        arrival: int64 [A], row at which each of these tokens arrived; None if they arrived in this order.
    """

    def __init__(
        self, local_ids: Tensor, counts: Tensor, on_host: list[int], alignment: int = 1, arrival: Tensor | None = None
    ) -> None:
        self.aligned = Aligned(counts, on_host, alignment)
        order = order_by_expert(local_ids, len(on_host))
        rows = self.aligned.rows
        self._slot_of_row = order.slot_of_row[:rows]
        token = order.token_of_row[:rows]
        self._arrival_of_row = token if arrival is None else arrival.index_select(0, token)
        self._shape = local_ids.shape
        self._arrival = arrival
        sums = Choice.below(order.row_of_slot, rows)
        self._sums = Choice(self._positions(sums.columns), sums.starts)

    def rows(self, arrived: Tensor) -> Tensor:
        """Rows of the experts [R, ...] from a matrix with one row per arrival."""
        return self.aligned.gather(arrived, self._arrival_of_row)

    def weights(self, weights: Tensor) -> Tensor:
        """Gate weights of the rows [R] from the tokens' [A, K], in the order of `local_ids`."""
        return self.aligned.gather(weights.reshape(-1), self._slot_of_row)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum of each token's rows, by slot: [R, H] -> [A, H]."""
        return self._sums.sum(rows)

    def slots(self, weights: Tensor) -> Tensor:
        """Numbers per slot [A, K] from one number per row [R], zero where the expert is on another rank."""
        position = self.aligned.position
        by_row = weights if position is None else weights.index_select(0, position)
        return weights.new_zeros(self._shape.numel()).index_copy_(0, self._slot_of_row, by_row).view(self._shape)

    def _positions(self, rows: Tensor) -> Tensor:
        positions = self.aligned.positions(rows)
        assert positions is not None
        return positions
