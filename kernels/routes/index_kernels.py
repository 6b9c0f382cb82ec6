"""Kernels of `index.py`. Each number has one writer; counts are sums of integers, the same in every order.

A number of tokens or rows that differs from call to call is not specialised, which would compile a kernel in the middle
of a run.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit
def load_ids(ids, token, tokens, stride, top_k: tl.constexpr, slots: tl.constexpr):
    """Experts of a block of tokens, int32 `[block, slots]`; -1 beyond the last token and the last slot."""
    slot = tl.arange(0, slots)
    inside = (token[:, None] < tokens) & (slot[None, :] < top_k)
    where = token[:, None].to(tl.int64) * stride + slot[None, :]
    return tl.load(ids + where, mask=inside, other=-1).to(tl.int32)


@triton.jit
def order_slots(
    ids, rows, numbers, tokens, experts, top_k: tl.constexpr, slots: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Number one expert's slots per program; the last program marks the slots that are sent nowhere."""
    expert = tl.program_id(0)
    slot = tl.arange(0, slots)
    last = expert == experts
    row = 0
    for start in range(0, tokens, block):
        token = start + tl.arange(0, block)
        found = load_ids(ids, token, tokens, top_k, top_k, slots)
        row += tl.sum(tl.sum(((found >= 0) & (found < expert)).to(tl.int32), axis=1), axis=0)
    first = row
    negative = 0
    for start in range(0, tokens, block):
        token = start + tl.arange(0, block)
        found = load_ids(ids, token, tokens, top_k, top_k, slots)
        inside = (token[:, None] < tokens) & (slot[None, :] < top_k)
        nowhere = inside & ((found < 0) | (found >= experts))
        hit = tl.where(last, nowhere, inside & (found == expert))
        any_slot = tl.max(hit.to(tl.int32), axis=1)
        place = tl.where(last, -1, row + tl.cumsum(any_slot, axis=0) - any_slot)
        where = token[:, None].to(tl.int64) * top_k + slot[None, :]
        tl.store(rows + where, tl.broadcast_to(place[:, None], [block, slots]), mask=hit)
        row += tl.sum(any_slot, axis=0)
        negative += tl.sum(tl.sum((inside & (found < 0)).to(tl.int32), axis=1), axis=0)
    # Sent rows begin at 0, room for as many numbers at `experts`, the negative ids at 2 `experts`.
    tl.store(numbers + tl.where(last, 2 * experts, expert), tl.where(last, negative, row - first).to(tl.int64))


@triton.jit
def count_tokens(
    ids, ranges, starts, targets, counts, tokens, top_k: tl.constexpr, slots: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Count the tokens with an expert in one range per program, and write the number to all its places."""
    number = tl.program_id(0)
    low, high = tl.load(ranges + 2 * number), tl.load(ranges + 2 * number + 1)
    count = 0
    for start in range(0, tokens, block):
        found = load_ids(ids, start + tl.arange(0, block), tokens, top_k, top_k, slots)
        count += tl.sum(tl.max(((found >= low) & (found < high)).to(tl.int32), axis=1), axis=0)
    for place in range(tl.load(starts + number), tl.load(starts + number + 1)):
        tl.store(counts + tl.load(targets + place), count.to(tl.int64))


@triton.jit(do_not_specialize=["tokens"])
def number_copies(
    ids,
    bounds,
    positions,
    tokens,
    stride,
    destinations,
    top_k: tl.constexpr,
    slots: tl.constexpr,
    block: tl.constexpr,
):
    """Number one destination's copies per program, behind those of the destinations before it."""
    own = tl.program_id(0)
    position = 0
    for start in range(0, tokens, block):
        found = load_ids(ids, start + tl.arange(0, block), tokens, stride, top_k, slots)
        for other in range(own):
            low, high = tl.load(bounds + other), tl.load(bounds + other + 1)
            position += tl.sum(tl.max(((found >= low) & (found < high)).to(tl.int32), axis=1), axis=0)
    low, high = tl.load(bounds + own), tl.load(bounds + own + 1)
    for start in range(0, tokens, block):
        token = start + tl.arange(0, block)
        found = load_ids(ids, token, tokens, stride, top_k, slots)
        wanted = tl.max(((found >= low) & (found < high)).to(tl.int32), axis=1)
        number = position + tl.cumsum(wanted, axis=0) - wanted
        where = token.to(tl.int64) * destinations + own
        tl.store(positions + where, tl.where(wanted > 0, number, -1), mask=token < tokens)
        position += tl.sum(wanted, axis=0)


@triton.jit
def place_of_block(
    counts,
    stride,
    source,
    expert,
    num_sources,
    num_experts,
    unit: tl.constexpr,
    sources: tl.constexpr,
    experts: tl.constexpr,
):
    """First row of a source's rows of an expert, and the ends of the expert's own rows and of all its rows."""
    s, e = tl.arange(0, sources), tl.arange(0, experts)
    inside = (s[:, None] < num_sources) & (e[None, :] < num_experts)
    sizes = tl.load(counts + s[:, None] * stride + e[None, :], mask=inside, other=0).to(tl.int32)
    totals = tl.sum(sizes, axis=0)
    wide = (totals + unit - 1) // unit * unit
    first = tl.sum(tl.where(e < expert, wide, 0), axis=0)
    before = tl.sum(tl.sum(tl.where((s[:, None] < source) & (e[None, :] == expert), sizes, 0), axis=1), axis=0)
    own = tl.sum(tl.where(e == expert, totals, 0), axis=0)
    return first + before, first + own, first + tl.sum(tl.where(e == expert, wide, 0), axis=0)


@triton.jit
def expand_tokens(
    ids,
    weights,
    counts,
    arriving,
    order,
    moved,
    arrival_of_row,
    row_weights,
    row_of_slot,
    offsets,
    first_expert,
    num_sources,
    num_experts,
    id_stride,
    weight_stride,
    count_stride,
    arriving_stride,
    sources: tl.constexpr,
    experts: tl.constexpr,
    unit: tl.constexpr,
    sorted_by_source: tl.constexpr,
    top_k: tl.constexpr,
    slots: tl.constexpr,
    block: tl.constexpr,
):
    """Make the rows of one source's tokens for one expert per program.

    Tokens lie in memory sorted by source, or else where `moved` says for each token of that order.
    """
    source, expert = tl.program_id(0) // num_experts, tl.program_id(0) % num_experts
    row, end, wide_end = place_of_block(
        counts, count_stride, source, expert, num_sources, num_experts, unit, sources, experts
    )
    s, slot = tl.arange(0, sources), tl.arange(0, slots)
    known = s < num_sources
    sizes = tl.load(arriving + s * arriving_stride, mask=known, other=0).to(tl.int32)
    turn = tl.load(order + s, mask=known, other=0)
    begin = tl.sum(tl.where(known & (turn < tl.load(order + source)), sizes, 0), axis=0)
    stop = begin + tl.sum(tl.where(s == source, sizes, 0), axis=0)
    for start in range(begin, stop, block):
        token = start + tl.arange(0, block)
        inside = (token[:, None] < stop) & (slot[None, :] < top_k)
        if not sorted_by_source:
            token = tl.load(moved + token, mask=token < stop, other=0).to(tl.int32)
        where = token[:, None].to(tl.int64)
        found = tl.load(ids + where * id_stride + slot[None, :], mask=inside, other=-1).to(tl.int32)
        hit = inside & (found == first_expert + expert)
        wanted = tl.max(hit.to(tl.int32), axis=1)
        number = row + tl.cumsum(wanted, axis=0) - wanted
        tl.store(arrival_of_row + number, token, mask=wanted > 0)
        weight = tl.load(weights + where * weight_stride + slot[None, :], mask=hit, other=0.0)
        tl.store(row_weights + number, tl.sum(weight, axis=1), mask=wanted > 0)
        where = where * top_k + slot[None, :]
        tl.store(row_of_slot + where, tl.broadcast_to(number[:, None], [block, slots]), mask=hit)
        elsewhere = (found < first_expert) | (found >= first_expert + num_experts)
        none = tl.zeros([block, slots], tl.int32) - 1
        one_program = tl.broadcast_to(expert, [block, slots]) == 0
        tl.store(row_of_slot + where, none, mask=inside & elsewhere & one_program)
        row += tl.sum(wanted, axis=0)
    if source == num_sources - 1:
        tl.store(offsets + expert, wide_end)
        for start in range(end, wide_end, block):
            fill = start + tl.arange(0, block)
            tl.store(arrival_of_row + fill, tl.zeros([block], tl.int32) - 1, mask=fill < wide_end)
            tl.store(row_weights + fill, tl.zeros([block], tl.float32), mask=fill < wide_end)


@triton.jit
def sort_blocks(
    sizes,
    arrival_of_row,
    row_of_arrival,
    offsets,
    num_sources,
    num_experts,
    sources: tl.constexpr,
    experts: tl.constexpr,
    unit: tl.constexpr,
    block: tl.constexpr,
):
    """Number one block of rows per program: its source's rows of its expert."""
    source, expert = tl.program_id(0) // num_experts, tl.program_id(0) % num_experts
    row, end, wide_end = place_of_block(
        sizes, num_experts, source, expert, num_sources, num_experts, unit, sources, experts
    )
    s, e = tl.arange(0, sources), tl.arange(0, experts)
    inside = (s[:, None] < num_sources) & (e[None, :] < num_experts)
    every = tl.load(sizes + s[:, None] * num_experts + e[None, :], mask=inside, other=0).to(tl.int32)
    earlier = (s[:, None] < source) | ((s[:, None] == source) & (e[None, :] < expert))
    arrival = tl.sum(tl.sum(tl.where(earlier, every, 0), axis=1), axis=0)
    count = tl.load(sizes + source * num_experts + expert).to(tl.int32)
    for start in range(0, count, block):
        step = start + tl.arange(0, block)
        tl.store(arrival_of_row + row + step, arrival + step, mask=step < count)
        tl.store(row_of_arrival + arrival + step, row + step, mask=step < count)
    if source == num_sources - 1:
        tl.store(offsets + expert, wide_end)
        for start in range(end, wide_end, block):
            fill = start + tl.arange(0, block)
            tl.store(arrival_of_row + fill, tl.zeros([block], tl.int32) - 1, mask=fill < wide_end)
