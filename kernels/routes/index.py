"""Positions of rows on their way to the experts and back, as torch operations of one kernel each.

Every position has one writer and every count is a sum of integers, so results never depend on timing. T or A tokens,
K top-k, E experts, B destinations, G ranks of the group, E_local experts of this rank. Positions are int32, and -1
stands for none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import Launch
from ..op import fused

TOKENS_AT_ONCE = 1024
"""Tokens that a program compares at once."""


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


# order_slots


def _order_slots(ids: Tensor, experts: int, local: int) -> tuple[Tensor, Tensor]:
    from .index_kernels import order_slots as kernel

    rows, numbers = _order_slots_shapes(ids, experts, local)
    tokens, top_k = ids.shape
    ids = ids.contiguous()
    Launch(
        kernel,
        experts + 1,
        (ids, rows, numbers, tokens, experts),
        {"top_k": top_k, "slots": power_of_two(top_k), "block": TOKENS_AT_ONCE},
        num_warps=8,
    ).run()
    return rows, numbers


def _order_slots_formula(ids: Tensor, experts: int, local: int) -> tuple[Tensor, Tensor]:
    flat = ids.reshape(-1)
    sent = (flat >= 0) & (flat < experts)
    order = torch.where(sent, flat, experts).argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel()))
    rows, numbers = _order_slots_shapes(ids, experts, local)
    rows.copy_(torch.where(sent, row, -1).view_as(ids))
    numbers.zero_()
    numbers[:experts] = torch.bincount(flat[sent], minlength=experts)
    numbers[2 * experts] = (flat < 0).sum()
    return rows, numbers


def _order_slots_shapes(ids: Tensor, experts: int, local: int) -> tuple[Tensor, Tensor]:
    rows = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    return rows, torch.empty(2 * experts + local, dtype=torch.int64, device=ids.device)


order_slots = fused(
    "order_slots(Tensor ids, int experts, int local) -> (Tensor, Tensor)",
    _order_slots,
    _order_slots_formula,
    _order_slots_shapes,
)
"""Rows of a rank's slots, sorted by expert and within an expert by token.

ids: int64 `[T, K]`, no expert twice for one token; negative is sent nowhere.

Returns the row of each slot `[T, K]`, -1 for a slot that is sent nowhere, and int64 `[2 E + local]`: rows of each
expert, room for E numbers, the number of negative ids, and room.
"""

# count_tokens


def _count_tokens(ids: Tensor, ranges: Tensor, starts: Tensor, targets: Tensor, size: int) -> Tensor:
    from .index_kernels import count_tokens as kernel

    counts = _count_tokens_shapes(ids, ranges, starts, targets, size)
    tokens, top_k = ids.shape
    Launch(
        kernel,
        ranges.shape[0],
        (ids.contiguous(), ranges, starts, targets, counts, tokens),
        {"top_k": top_k, "slots": power_of_two(top_k), "block": TOKENS_AT_ONCE},
        num_warps=8,
    ).run()
    return counts


def _count_tokens_formula(ids: Tensor, ranges: Tensor, starts: Tensor, targets: Tensor, size: int) -> Tensor:
    wanted = (ids[:, :, None] >= ranges[:, 0]) & (ids[:, :, None] < ranges[:, 1])
    counts = torch.zeros(size, dtype=torch.int64)
    counts[targets.long()] = wanted.any(1).sum(0).repeat_interleave(starts.diff())
    return counts


def _count_tokens_shapes(ids: Tensor, ranges: Tensor, starts: Tensor, targets: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=ids.device)


count_tokens = fused(
    "count_tokens(Tensor ids, Tensor ranges, Tensor starts, Tensor targets, int size) -> Tensor",
    _count_tokens,
    _count_tokens_formula,
    _count_tokens_shapes,
)
"""Numbers of tokens with any expert in a range, each number at several places of a vector int64 `[size]`.

ids: int64 `[T, K]`; ranges: int32 `[U, 2]`, first expert and end; the number of tokens of range u is written to
`targets[starts[u]:starts[u + 1]]`, both int32. Other places are left as they are in new memory.
"""

# number_copies


def _number_copies(ids: Tensor, bounds: Tensor) -> Tensor:
    from .index_kernels import number_copies as kernel

    positions = _number_copies_shapes(ids, bounds)
    tokens, top_k = ids.shape
    if tokens:
        Launch(
            kernel,
            positions.shape[1],
            (ids, bounds, positions, tokens, ids.stride(0), positions.shape[1]),
            {"top_k": top_k, "slots": power_of_two(top_k), "block": TOKENS_AT_ONCE},
            num_warps=8,
        ).run()
    return positions


def _number_copies_formula(ids: Tensor, bounds: Tensor) -> Tensor:
    wanted = ((ids[:, :, None] >= bounds[:-1]) & (ids[:, :, None] < bounds[1:])).any(1)
    number = (wanted.t().reshape(-1).cumsum(0) - 1).view(bounds.numel() - 1, -1).t()
    return torch.where(wanted, number, -1).to(torch.int32).contiguous()


def _number_copies_shapes(ids: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty(ids.shape[0], bounds.numel() - 1, dtype=torch.int32, device=ids.device)


number_copies = fused(
    "number_copies(Tensor ids, Tensor bounds) -> Tensor",
    _number_copies,
    _number_copies_formula,
    _number_copies_shapes,
)
"""Positions of the tokens' copies for several destinations, sorted by destination and then by token: `[A, B]`.

ids: integers `[A, K]` with any stride between rows; destination b has the experts `bounds[b]` to `bounds[b + 1]` - 1,
and bounds int32 `[B + 1]` ascend.
"""

# expand_tokens

Expanded = tuple[Tensor, Tensor, Tensor, Tensor]


class Arrivals(NamedTuple):
    """Tokens that have arrived: arguments of `expand_tokens`."""

    ids: Tensor
    """Integers `[A, K]` with any stride between rows, the experts of the tokens in the order of arrival."""
    weights: Tensor
    """FP32 `[A, K]` likewise."""
    counts: Tensor
    """int64 `[G, E_local]`, rows of each source for each expert."""
    tokens: Tensor
    """int64 `[G]`, tokens of each source."""
    order: Tensor
    """Integers `[G]`, place of each source among the sources."""
    moved: Tensor | None = None
    """Integers `[A]`, arrival of each token in the order of sources; None if they arrived in this order."""


def _expand_tokens(
    ids: Tensor,
    weights: Tensor,
    counts: Tensor,
    tokens: Tensor,
    order: Tensor,
    moved: Tensor | None,
    first: int,
    unit: int,
    rows: int,
) -> Expanded:
    from .index_kernels import expand_tokens as kernel

    made = _empty_rows(ids, counts, rows)
    sources, experts = counts.shape
    assert ids.stride(1) == weights.stride(1) == counts.stride(1) == 1
    strides = ids.stride(0), weights.stride(0), counts.stride(0), tokens.stride(0)
    sizes = {"sources": power_of_two(sources), "experts": power_of_two(experts)}
    tables = order, order if moved is None else moved
    Launch(
        kernel,
        sources * experts,
        (ids, weights, counts, tokens, *tables, *made, first, sources, experts, *strides),
        {
            **sizes,
            "unit": unit,
            "sorted_by_source": moved is None,
            "top_k": ids.shape[1],
            "slots": power_of_two(ids.shape[1]),
            "block": 512,
        },
        num_warps=4,
    ).run()
    return made


def _expand_tokens_formula(
    ids: Tensor,
    weights: Tensor,
    counts: Tensor,
    tokens: Tensor,
    order: Tensor,
    moved: Tensor | None,
    first: int,
    unit: int,
    rows: int,
) -> Expanded:
    made = _empty_rows(ids, counts, rows)
    arrival_of_row, row_weights, row_of_slot, offsets = made
    arrival_of_row.fill_(-1), row_weights.zero_(), row_of_slot.fill_(-1)
    place = torch.arange(len(ids)) if moved is None else moved.long()
    by_turn = order.argsort()
    starts = torch.empty_like(tokens)
    starts[by_turn] = tokens[by_turn].cumsum(0) - tokens[by_turn]
    end = 0
    for expert in range(counts.shape[1]):
        row = end
        for start, number in zip(starts.tolist(), tokens.tolist(), strict=True):
            token, slot = (ids[place[start : start + number]] == first + expert).nonzero(as_tuple=True)
            token = place[start + token]
            here = slice(row, row + token.numel())
            arrival_of_row[here] = token.to(torch.int32)
            row_weights[here] = weights[token, slot]
            row_of_slot[token, slot] = torch.arange(row, here.stop, dtype=torch.int32)
            row = here.stop
        end += -(-(row - end) // unit) * unit
        offsets[expert] = end
    return made


def _expand_tokens_shapes(
    ids: Tensor,
    weights: Tensor,
    counts: Tensor,
    tokens: Tensor,
    order: Tensor,
    moved: Tensor | None,
    first: int,
    unit: int,
    rows: int,
) -> Expanded:
    return _empty_rows(ids, counts, rows)


def _empty_rows(ids: Tensor, counts: Tensor, rows: int) -> Expanded:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=ids.device)

    return empty(rows), empty(rows, dtype=torch.float32), empty(*ids.shape), empty(counts.shape[1])


expand_tokens = fused(
    "expand_tokens(Tensor ids, Tensor weights, Tensor counts, Tensor tokens, Tensor order, Tensor? moved, int first, "
    "int unit, int rows) -> (Tensor, Tensor, Tensor, Tensor)",
    _expand_tokens,
    _expand_tokens_formula,
    _expand_tokens_shapes,
)
"""Rows of this rank's experts, made of the tokens that arrived: sorted by expert, source rank and token.

The first arguments are those of `Arrivals`. first: number of this rank's first expert. unit: multiple to which each
expert's rows are filled up; rows: their number in all.

Returns the arrival of each row `[rows]`, -1 for the rows that fill up; the rows' weights FP32 `[rows]`, 0 for these;
the row of each slot `[A, K]`, -1 for experts of other ranks; the end of each expert's rows `[E_local]`.
"""

# sort_blocks


def _sort_blocks(sizes: Tensor, unit: int, arrived: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    from .index_kernels import sort_blocks as kernel

    made = _sort_blocks_shapes(sizes, unit, arrived, rows)
    sources, experts = sizes.shape
    powers = {"sources": power_of_two(sources), "experts": power_of_two(experts)}
    Launch(
        kernel,
        sources * experts,
        (sizes.contiguous(), *made, sources, experts),
        {**powers, "unit": unit, "block": 512},
        num_warps=4,
    ).run()
    return made


def _sort_blocks_formula(sizes: Tensor, unit: int, arrived: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    made = _sort_blocks_shapes(sizes, unit, arrived, rows)
    arrival_of_row, row_of_arrival, offsets = made
    arrival_of_row.fill_(-1)
    starts = (sizes.reshape(-1).cumsum(0) - sizes.reshape(-1)).view_as(sizes).tolist()
    end = 0
    for expert in range(sizes.shape[1]):
        row = end
        for source, number in enumerate(sizes[:, expert].tolist()):
            start = starts[source][expert]
            arrival_of_row[row : row + number] = torch.arange(start, start + number)
            row_of_arrival[start : start + number] = torch.arange(row, row + number)
            row += number
        end += -(-(row - end) // unit) * unit
        offsets[expert] = end
    return made


def _sort_blocks_shapes(sizes: Tensor, unit: int, arrived: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    def empty(number: int) -> Tensor:
        return torch.empty(number, dtype=torch.int32, device=sizes.device)

    return empty(rows), empty(arrived), empty(sizes.shape[1])


sort_blocks = fused(
    "sort_blocks(Tensor sizes, int unit, int arrived, int rows) -> (Tensor, Tensor, Tensor)",
    _sort_blocks,
    _sort_blocks_formula,
    _sort_blocks_shapes,
)
"""Order of rows that arrived sorted by source rank and expert, to be sorted by expert and source rank.

sizes: int64 `[G, E_local]`, rows of each source for each expert, `arrived` in all; unit and rows: see `expand_tokens`.

Returns the arrival of each row `[rows]`, -1 for the rows that fill up, its inverse `[arrived]`, and the end of
each expert's rows `[E_local]`.
"""
