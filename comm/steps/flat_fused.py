"""Work of a flat route by fused kernels, on GPUs: the values of `flat_plain.py`, one launch for each method."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routes.index import order_slots, sort_blocks
from ...kernels.routes.rows import gather_rows, pick_numbers, put_numbers, spread_rows, sum_copies


class FusedSteps:
    """Indices of one route, and the moves and sums of rows along it; arguments and methods are those of `PlainSteps`.

    `counts` and `into` lie in one piece of memory with the number of slots that are sent nowhere, so that the host
    reads what it needs in one copy.
    """

    def __init__(self, expert_ids: Tensor, size: int, local: int, alignment: int) -> None:
        self._shape, self._alignment = (size, local), alignment
        self.slots, experts = expert_ids.numel(), size * local
        self._row_of_slot, self._numbers = order_slots(expert_ids, experts, local)
        self.counts, self.into = self._numbers[:experts], self._numbers[experts : 2 * experts]
        self.tokens_per_expert: list[int] = []
        self._sorted: tuple[Tensor, Tensor] | None = None

    def numbers(self, received: Tensor) -> Tensor:
        return self._numbers.view(-1, self._shape[1])

    def complete(self, received: Tensor, rows_sent: int, received_on_host: list[list[int]]) -> None:
        per_expert = [sum(column) for column in zip(*received_on_host, strict=True)]
        self.tokens_per_expert = [-(-rows // self._alignment) * self._alignment for rows in per_expert]
        if min(self._shape) == 1 and sum(per_expert) == sum(self.tokens_per_expert):
            ends = received if self._shape[0] == 1 else received.sum(0, keepdim=True)
            self.offsets = ends.cumsum(0, dtype=torch.int32)
            return
        *order, self.offsets = sort_blocks(
            received.view(self._shape), self._alignment, sum(per_expert), sum(self.tokens_per_expert)
        )
        self._sorted = order[0], order[1]

    def to_slots(self, rows: Tensor) -> Tensor:
        return spread_rows(_by_rows(rows), self._row_of_slot, self.slots)

    def weights_to_slots(self, weights: Tensor) -> Tensor:
        return put_numbers(weights, self._row_of_slot, self.slots)

    def to_experts(self, rows: Tensor) -> Tensor:
        return rows if self._sorted is None else gather_rows(rows, self._sorted[0])

    def weights_to_experts(self, weights: Tensor) -> Tensor:
        return weights if self._sorted is None else pick_numbers(weights, self._sorted[0])

    def to_sources(self, rows: Tensor) -> Tensor:
        return rows if self._sorted is None else gather_rows(_by_rows(rows), self._sorted[1])

    def weights_to_sources(self, weights: Tensor) -> Tensor:
        return weights if self._sorted is None else pick_numbers(weights, self._sorted[1])

    def sum(self, rows: Tensor) -> Tensor:
        return sum_copies(_by_rows(rows), self._row_of_slot)

    def from_slots(self, numbers: Tensor) -> Tensor:
        return pick_numbers(numbers, self._row_of_slot)


def _by_rows(rows: Tensor) -> Tensor:
    """The rows, with the values of a row side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
