"""On the experts' rank: one row for each token that arrived becomes one for each of its experts here, and back.

A tokens that arrived, K top-k, E_local experts of this rank, R rows of `Dispatched`.
"""

from __future__ import annotations

from torch import Tensor

from .align import Aligned
from .permute import Choice, order_by_expert


class Expansion:
    """Which rows the tokens that have arrived become.

    Args:
        local_ids: int64 [A, K], experts of this rank by their local number, -1 for those of other ranks. Rows of an
            expert come in the order of the tokens.
        counts: int64 [E_local], rows of each expert, and on_host the same as a list.
        alignment: see `Aligned`.
        arrival: int64 [A], where each of these tokens lies in what arrived; None for the same order.
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
        self._sums = Choice(self._places(sums.columns), sums.starts)

    def rows(self, arrived: Tensor) -> Tensor:
        """Of a matrix with a row for each arrival, those of the experts: [R, ...]."""
        return self.aligned.gather(arrived, self._arrival_of_row)

    def weights(self, weights: Tensor) -> Tensor:
        """Of the tokens' gate weights [A, K], in the order of `local_ids`, those of the rows: [R]."""
        return self.aligned.gather(weights.reshape(-1), self._slot_of_row)

    def sum(self, rows: Tensor) -> Tensor:
        """Rows [R, H] -> for each token the sum of its own, by slot: [A, H]."""
        return self._sums.sum(rows)

    def slots(self, weights: Tensor) -> Tensor:
        """Something for each row [R] -> the same for each slot [A, K], zero where its expert is not here."""
        given = weights if self.aligned.place is None else weights.index_select(0, self.aligned.place)
        return weights.new_zeros(self._shape.numel()).index_copy_(0, self._slot_of_row, given).view(self._shape)

    def _places(self, rows: Tensor) -> Tensor:
        places = self.aligned.places(rows)
        assert places is not None
        return places
