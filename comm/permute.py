"""Rows to experts and back on one rank: stable order by expert, and sums of gathered rows.

T tokens, K top-k, E experts, H hidden, R = T x K rows.
Gathers only, no scattered additions: the same inputs give the same bits on every run and with any number of threads.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExpertOrder:
    """Order of the slots of a rank's tokens: sorted by expert, and within an expert by token.

    A slot is one of a token's K choices and has the number `token * K + k`; a row is a slot's position in the order.
    Slots that are sent nowhere come last.
    """

    slot_of_row: Tensor  # int64 [R]
    token_of_row: Tensor  # int64 [R]
    row_of_slot: Tensor  # int64 [T, K], the inverse of slot_of_row
    rows_per_expert: Tensor  # int64 [E]
    dropped: Tensor  # int64 [1], slots that are sent nowhere


def order_by_expert(expert_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Sort slots by expert without waiting for the device.

    Args:
        expert_ids: int64 [T, K] in [0, num_experts), no expert twice for one token; -1 is sent nowhere.
    """
    flat = expert_ids.reshape(-1)
    # Slots that are sent nowhere are sorted as one more expert; ids of no expert come behind them, uncounted.
    keys = torch.where(flat < 0, num_experts, flat + (flat >= num_experts))
    slot_of_row = _stable_argsort(keys, num_experts + 2)
    slots = torch.arange(flat.numel(), device=flat.device)
    row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, slots)
    # Counts by a search in the sorted ids: bincount makes the host wait for a GPU's largest value.
    bounds = torch.arange(num_experts + 2, device=flat.device, dtype=flat.dtype)
    counts = torch.searchsorted(keys.index_select(0, slot_of_row), bounds).diff()
    return ExpertOrder(
        slot_of_row=slot_of_row,
        token_of_row=torch.div(slot_of_row, expert_ids.shape[1], rounding_mode="floor"),
        row_of_slot=row_of_slot.view(expert_ids.shape),
        rows_per_expert=counts[:-1],
        dropped=counts[-1:],
    )


def _stable_argsort(ids: Tensor, num_ids: int) -> Tensor:
    """Indices that sort `ids` int64 [R] in [0, num_ids), equal ids in their order."""
    narrow = ids.to(torch.int16) if num_ids <= 2**15 else ids
    if ids.device.type == "cpu":
        # NumPy sorts 16-bit keys by radix: 0.02 ms where torch takes 0.2 ms (8,192 keys).
        return torch.from_numpy(np.argsort(narrow.numpy(), kind="stable"))
    return torch.argsort(narrow, stable=True)


@dataclass(frozen=True)
class Choice:
    """Choice of the rows that each of T sums adds up: any number, also none."""

    columns: Tensor
    """int64 [N], the rows of the first sum, in the order in which they are added, then those of the second, ..."""
    starts: Tensor
    """int64 [T + 1], start of each sum in `columns`, and N at the end."""

    @classmethod
    def every(cls, index: Tensor) -> Choice:
        """Choice of all entries of each row of `index` int64 [T, K], in their order."""
        return cls(index.reshape(-1), torch.arange(0, index.numel() + 1, index.shape[1], device=index.device))

    @classmethod
    def below(cls, index: Tensor, limit: int) -> Choice:
        """Choice of the entries below `limit` of each row of `index` int64 [T, K]; there are `limit` of them in all."""
        if index.numel() == limit:
            return cls.every(index)
        chosen = index < limit
        flat = index.reshape(-1).index_select(0, _positions(chosen.reshape(-1), limit))
        return cls(flat, starts_of(chosen.sum(1)))

    def sum(self, rows: Tensor) -> Tensor:
        """Sums of rows [R, H] BF16, FP16 or FP32 -> [T, H] in their type, without a copy of the rows that are added.

        The order is fixed: an FP32 accumulator starts at +0.0, the rows are added one after the other, and the total is
        rounded once, to nearest even.
        """
        tokens = self.starts.numel() - 1
        if tokens == 0 or rows.shape[0] == 0:
            assert self.columns.numel() == 0, f"{tokens} sums need rows, but there are none"
            return rows.new_zeros((tokens, *rows.shape[1:]))
        rows = rows.detach()  # embedding_bag prepares a backward of its own for rows that require a gradient
        if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16):
            # embedding_bag takes a third of the time but rounds ties away from zero: 7 % of the sums of four BF16.
            ones = torch.ones(self.columns.numel(), dtype=rows.dtype)
            choice = _csr(self.starts, self.columns, ones, (tokens, rows.shape[0]))
            return torch.sparse.mm(choice, rows, "sum")
        return F.embedding_bag(self.columns, rows, self.starts[:-1], mode="sum")


class FanOut:
    """Copies of rows for several of B destinations, sorted by destination and then by row, and their sums back.

    Args:
        wanted: bool [A, B], whether destination b gets a copy of row a.
        copies: number of copies in all, an argument because reading it would wait for the device.
    """

    def __init__(self, wanted: Tensor, copies: int) -> None:
        rows, destinations = wanted.shape
        by_destination = wanted.t().reshape(-1)
        self.row_of_copy = _positions(by_destination, copies) % max(rows, 1)
        """int64 [copies]"""
        number = (by_destination.cumsum(0) - 1).view(destinations, rows).t().reshape(-1)
        of_row = number.index_select(0, _positions(wanted.reshape(-1), copies))
        self.back = Choice(of_row, starts_of(wanted.sum(1)))
        """Choice of each row's copies, by destination."""


def _positions(chosen: Tensor, count: int) -> Tensor:
    """Positions of the `count` True values of bool [N], ascending, without waiting for the device."""
    return torch.nonzero_static(chosen, size=count).view(-1)


def starts_of(sizes: Tensor) -> Tensor:
    """Starts of consecutive pieces of these `sizes` int64 [N], and the end of the last piece: int64 [N + 1]."""
    starts = sizes.new_zeros(sizes.numel() + 1)
    torch.cumsum(sizes, 0, out=starts[1:])
    return starts


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


with warnings.catch_warnings():
    # torch warns once per process that CSR tensors are in beta; a user could do nothing about it.
    warnings.simplefilter("ignore")
    _csr(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0), (0, 0))


def transpose_blocks(sizes: Tensor, num_rows: int) -> Tensor:
    """Index that reorders rows stored in blocks (a, b) into blocks (b, a), each block kept as it is.

    Args:
        sizes: int64 [A, B], rows in each block.
        num_rows: their sum, an argument because reading it would wait for the device.

    Returns:
        int64 [num_rows]; `rows.index_select(0, index)` is in the new order.
        Its inverse is `transpose_blocks(sizes.t(), num_rows)`.
    """
    flat = sizes.reshape(-1)
    old_starts = (flat.cumsum(0) - flat).view(sizes.shape).t().reshape(-1)
    new_sizes = sizes.t().reshape(-1)
    new_starts = new_sizes.cumsum(0) - new_sizes
    shift = torch.repeat_interleave(old_starts - new_starts, new_sizes, output_size=num_rows)
    return shift + torch.arange(num_rows, device=sizes.device)
