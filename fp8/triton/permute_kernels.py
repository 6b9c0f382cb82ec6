"""Kernels that quantise rows for the experts, and sum rows from them. Each number has one writer, in a fixed order."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ...kernels.launch import load_triton
from .numerics import LARGEST_BF16, SIDE, scales_of, tell

triton, tl = load_triton()


@triton.jit
def quantize_to_rows(
    x,
    row_of_slot,
    message,
    message_scales,
    met,
    width,
    tiles,
    parts,
    row_bytes,
    scale_start,
    top_k: tl.constexpr,
    pow2: tl.constexpr,
    watched: tl.constexpr,
    block: tl.constexpr,
):
    """Quantise `block` tiles of a token of x `[., width]` per program, once, and write them to its rows of the message.

    `message` `[., row_bytes]` uint8 and `message_scales` `[., row_bytes / 4]` FP32 are the same memory; scales begin
    at FP32 number `scale_start` of a row. Slots with a negative row are skipped. With a `top_k` of 0 a token's row is
    its own number. `met` is set where a value is infinite or NaN, if `watched`.
    """
    part, token = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    tile = part * block + tl.arange(0, block)
    column = tile[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    inside = column < width
    values = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    if watched:
        tell(values, met)
    multiplier, scale = scales_of(tl.max(tl.abs(values), axis=1), pow2, LARGEST_BF16)
    encoded = (values * multiplier[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    for slot in tl.static_range(top_k if top_k > 0 else 1):
        row = tl.load(row_of_slot + token * top_k + slot).to(tl.int64) if top_k > 0 else token
        wanted = tl.broadcast_to(row, [block]) >= 0
        tl.store(message + row * row_bytes + column, encoded, mask=inside & wanted[:, None])
        start = message_scales + row * (row_bytes // 4) + scale_start
        tl.store(start + tile, scale, mask=(tile < tiles) & wanted)


@triton.jit
def combine(
    rows,
    row_of_slot,
    weights,
    out,
    width,
    parts,
    top_k: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Add `block` columns of a token's rows per program, in FP32, starting at +0, in the order of its slots."""
    part, token = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    column = part * block + tl.arange(0, block)
    inside = column < width
    total = tl.zeros([block], tl.float32)
    for slot in tl.static_range(top_k):
        row = tl.load(row_of_slot + token * top_k + slot).to(tl.int64)
        wanted = tl.broadcast_to(row, [block]) >= 0
        value = tl.load(rows + row * width + column, mask=inside & wanted, other=0.0).to(tl.float32)
        if weighted:
            # Products are rounded before they are added: nothing here is compiled with fused multiply-adds.
            value = value * tl.load(weights + token * top_k + slot)
            value = tl.where(wanted, value, 0.0)
        total = total + value
    tl.store(out + token * width + column, total.to(tl.bfloat16), mask=inside)


@triton.jit
def combine_backward(
    grad,
    rows,
    weights,
    slot_of_row,
    grad_rows,
    grad_weights,
    width,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    """Make a row of `grad_rows` per program, and its slot's weight gradient: a dot product of row and gradient."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_of_row + row).to(tl.int64)
    wanted = slot >= 0
    token = slot // top_k
    weight = tl.load(weights + slot, mask=wanted, other=0.0)
    named = tl.broadcast_to(slot, [block]) >= 0
    products = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        inside = column < width
        gradient = tl.load(grad + token * width + column, mask=inside & named, other=0.0).to(tl.float32)
        value = tl.load(rows + row * width + column, mask=inside & named, other=0.0).to(tl.float32)
        products = products + gradient * value
        tl.store(grad_rows + row * width + column, (gradient * weight).to(tl.bfloat16), mask=inside)
    tl.store(grad_weights + slot, tl.sum(products, axis=0), mask=wanted)
