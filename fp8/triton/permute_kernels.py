"""Kernel that quantises rows for the experts. Each number has one writer."""

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
