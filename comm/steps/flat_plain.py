"""Work of a flat route by torch's operations, on CPUs; `flat_fused.py` does the same by fused kernels.

G ranks of the group, E_local experts of this rank, T tokens, K top-k, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..align import Aligned
from ..permute import Choice, order_by_expert, transpose_blocks


class PlainSteps:
    """Indices of one route, and the moves and sums of rows along it.

    Args:
        expert_ids: int64 [T, K].
        size, local: G and E_local.
        alignment: multiple to which each expert's rows are filled up.
    """

    def __init__(self, expert_ids: Tensor, size: int, local: int, alignment: int) -> None:
        self._shape, self._alignment = (size, local), alignment
        self.slots = expert_ids.numel()
        self.order = order_by_expert(expert_ids, size * local)
        self.counts = self.order.rows_per_expert
        """int64 [G E_local], rows for each expert."""
        self.into: Tensor | None = None
        """Memory for the counts that this rank receives; None leaves it to the exchange."""
        self.tokens_per_expert: list[int] = []

    def numbers(self, received: Tensor) -> Tensor:
        """Numbers for the host, int64 [2 G + 1, E_local]: rows sent, rows received, slots that are sent nowhere."""
        dropped = self.order.dropped.expand(1, self._shape[1])
        return torch.cat((self.counts.view(self._shape), received.view(self._shape), dropped))

    def complete(self, received: Tensor, rows_sent: int, received_on_host: list[list[int]]) -> None:
        """Take the counts: `received` [G E_local], also on the host as [G, E_local], and the number of rows sent."""
        sizes, rows_received = received.view(self._shape), sum(map(sum, received_on_host))
        self._rows_sent = rows_sent
        self._sums = Choice.below(self.order.row_of_slot, rows_sent)
        per_expert = [sum(column) for column in zip(*received_on_host, strict=True)]
        self._aligned = Aligned(sizes.sum(0), per_expert, self._alignment)
        self.tokens_per_expert, self.offsets = self._aligned.tokens_per_expert, self._aligned.offsets
        # Indices between the order of arrival and the experts' order, None where the two are the same.
        several = min(self._shape) > 1
        self._by_expert = transpose_blocks(sizes, rows_received) if several else None
        self._by_source = self._aligned.positions(transpose_blocks(sizes.t(), rows_received) if several else None)

    def to_slots(self, rows: Tensor) -> Tensor:
        """A copy of its token's row for each slot, by expert; slots that are sent nowhere come last."""
        return rows.index_select(0, self.order.token_of_row)

    def weights_to_slots(self, weights: Tensor) -> Tensor:
        """Gate weights [T, K] in the order of `to_slots`."""
        return weights.reshape(-1).index_select(0, self.order.slot_of_row)

    def to_experts(self, rows: Tensor) -> Tensor:
        """Rows in the experts' order, from the order of arrival."""
        return self._aligned.gather(rows, self._by_expert)

    def weights_to_experts(self, weights: Tensor) -> Tensor:
        """Weights of the rows in the experts' order."""
        return self._aligned.gather(weights, self._by_expert)

    def to_sources(self, rows: Tensor) -> Tensor:
        """Rows in the order of arrival, from the experts' order, without the rows that fill up."""
        return rows if self._by_source is None else rows.index_select(0, self._by_source)

    def weights_to_sources(self, weights: Tensor) -> Tensor:
        """Numbers of the rows in the order of arrival."""
        return self.to_sources(weights)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum of each token's returned rows, by slot."""
        return self._sums.sum(rows)

    def from_slots(self, numbers: Tensor) -> Tensor:
        """Numbers by slot [T, K] from one per returned row, zero for slots that were sent nowhere."""
        slots, order = self.order.row_of_slot, self.order.slot_of_row[: self._rows_sent]
        return numbers.new_zeros(slots.numel()).index_copy_(0, order, numbers).view(slots.shape)
