"""Kernels of `rows.py`. Each number has one writer, and sums have a fixed order.

Strides and widths of rows are given in units of `step` numbers, 16 bytes where all of them are multiples of it. The
compiler then knows that rows begin at such addresses, and moves 16 bytes at a time.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit
def spread_rows(
    rows, positions, out, stride, width, parts, step: tl.constexpr, copies: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Read `block` columns of a row per program, and write them to each of its positions."""
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    column = part * block + tl.arange(0, block)
    inside = column < width * step
    values = tl.load(rows + row * (stride * step) + column, mask=inside)
    for copy in tl.static_range(copies):
        position = tl.load(positions + row * copies + copy).to(tl.int64)
        wanted = tl.broadcast_to(position, [block]) >= 0
        tl.store(out + position * (width * step) + column, values, mask=inside & wanted)


@triton.jit
def spread_messages(
    payload,
    weights,
    ids,
    positions,
    out,
    out_weights,
    out_ids,
    stride,
    width,
    parts,
    out_width,
    out_weights_width,
    out_ids_width,
    weights_start,
    ids_start,
    step: tl.constexpr,
    top_k: tl.constexpr,
    slots: tl.constexpr,
    copies: tl.constexpr,
    block: tl.constexpr,
):
    """Write `block` columns of a row per program to each of its messages; the first part also writes weights and ids.

    `out`, `out_weights` and `out_ids` are the same memory as numbers of three types, with widths and starts in these.
    """
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    column = part * block + tl.arange(0, block)
    inside = column < width * step
    values = tl.load(payload + row * (stride * step) + column, mask=inside)
    slot = tl.arange(0, slots)
    named = (slot < top_k) & (tl.broadcast_to(part, [slots]) == 0)
    weight = tl.load(weights + row * top_k + slot, mask=named)
    expert = tl.load(ids + row * top_k + slot, mask=named).to(out_ids.dtype.element_ty)
    for copy in tl.static_range(copies):
        position = tl.load(positions + row * copies + copy).to(tl.int64)
        wanted = tl.broadcast_to(position, [block]) >= 0
        tl.store(out + position * (out_width * step) + column, values, mask=inside & wanted)
        wanted = named & (tl.broadcast_to(position, [slots]) >= 0)
        tl.store(out_weights + position * out_weights_width + weights_start + slot, weight, mask=wanted)
        tl.store(out_ids + position * out_ids_width + ids_start + slot, expert, mask=wanted)


@triton.jit
def gather_rows(source, index, out, stride, width, parts, step: tl.constexpr, block: tl.constexpr):
    """Copy `block` columns of a row per program, or zeros for a row without a source."""
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    column = part * block + tl.arange(0, block)
    inside = column < width * step
    found = tl.load(index + row).to(tl.int64)
    there = tl.broadcast_to(found, [block]) >= 0
    values = tl.load(source + found * (stride * step) + column, mask=inside & there, other=0)
    tl.store(out + row * (width * step) + column, values, mask=inside)


@triton.jit
def sum_copies(
    rows, positions, out, stride, width, parts, step: tl.constexpr, copies: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Add `block` columns of the rows at a sum's positions per program, in FP32, starting at +0, in their order."""
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    column = part * block + tl.arange(0, block)
    inside = column < width * step
    total = tl.zeros([block], tl.float32)
    for copy in tl.static_range(copies):
        position = tl.load(positions + row * copies + copy).to(tl.int64)
        wanted = tl.broadcast_to(position, [block]) >= 0
        total += tl.load(rows + position * (stride * step) + column, mask=inside & wanted, other=0.0).to(tl.float32)
    tl.store(out + row * (width * step) + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["number"])
def put_numbers(values, positions, out, number, block: tl.constexpr):
    """Write `block` numbers per program to their positions."""
    each = tl.program_id(0) * block + tl.arange(0, block)
    position = tl.load(positions + each, mask=each < number, other=-1)
    value = tl.load(values + each, mask=each < number)
    tl.store(out + position, value, mask=position >= 0)


@triton.jit(do_not_specialize=["number"])
def pick_numbers(values, positions, out, number, block: tl.constexpr):
    """Read `block` numbers per program at their positions, 0 where there is none."""
    each = tl.program_id(0) * block + tl.arange(0, block)
    position = tl.load(positions + each, mask=each < number, other=-1)
    value = tl.load(values + position, mask=position >= 0, other=0)
    tl.store(out + each, value, mask=each < number)
