"""Rotation and layout of queries, keys and values for attention, and the way back.

Members of a pair are neighbours in memory, so a pair is split from and joined to a row of `[., 2]`.
"""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit
def _turn(x, cos, sin):
    """x `[rows, 2 pairs]` FP32 with every pair multiplied by `cos + i sin` `[pairs]`."""
    rows: tl.constexpr = x.shape[0]
    pairs: tl.constexpr = x.shape[1] // 2
    real, imaginary = tl.split(tl.reshape(x, [rows, pairs, 2]))
    turned = tl.join(real * cos[None, :] - imaginary * sin[None, :], real * sin[None, :] + imaginary * cos[None, :])
    return tl.reshape(turned, [rows, 2 * pairs])


@triton.jit
def _factors(rotary, position, rotated, half: tl.constexpr):
    """Cosines and sines `[half]` of a position's pairs, from `rotary` `[., rotated / 2, 2]`."""
    column = tl.arange(0, 2 * half)
    both = tl.load(rotary + position * rotated + column, mask=column < rotated, other=0.0)
    return tl.split(tl.reshape(both, [half, 2]))


@triton.jit
def assemble(
    query,
    key_value,
    rotary_key,
    rotary,
    out_query,
    out_key,
    out_value,
    length,
    heads,
    parts,
    query_stride,
    key_value_stride,
    rotary_key_stride,
    scale,
    plain: tl.constexpr,
    rotated: tl.constexpr,
    value_width: tl.constexpr,
    plain_block: tl.constexpr,
    half: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
):
    """Query, key and value of `block` heads of a token per program; a token's heads lie together, strides are tokens'.

    Query `[., heads, plain + rotated]` times `scale`, key likewise from keys and values `[., heads, plain +
    value_width]` and from the one rotary key `[., rotated]`.
    """
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    head = part * block + tl.arange(0, block)
    there = (head < heads)[:, None]
    cos, sin = _factors(rotary, token % length, rotated, half)
    column = tl.arange(0, plain_block)[None, :]
    turning = tl.arange(0, 2 * half)[None, :]
    kind = out_query.dtype.element_ty
    width: tl.constexpr = plain + rotated
    both: tl.constexpr = plain + value_width
    row = head[:, None]
    out = (token * heads + row) * width

    inside = there & (column < plain)
    value = tl.load(query + token * query_stride + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_query + out + column, (value * scale).to(kind), mask=inside)
    value = tl.load(key_value + token * key_value_stride + row * both + column, mask=inside, other=0.0)
    tl.store(out_key + out + column, value, mask=inside)

    turns = there & (turning < rotated)
    value = tl.load(query + token * query_stride + row * width + plain + turning, mask=turns, other=0.0)
    value = _turn(value.to(tl.float32), cos * scale, sin * scale)
    tl.store(out_query + out + plain + turning, value.to(kind), mask=turns)
    shared = tl.load(rotary_key + token * rotary_key_stride + turning, mask=turning < rotated, other=0.0)
    shared = _turn(shared.to(tl.float32), cos, sin).to(kind)
    tl.store(out_key + out + plain + turning, tl.broadcast_to(shared, [block, 2 * half]), mask=turns)

    behind = tl.arange(0, value_block)[None, :]
    valued = there & (behind < value_width)
    value = tl.load(key_value + token * key_value_stride + row * both + plain + behind, mask=valued, other=0.0)
    tl.store(out_value + (token * heads + row) * value_width + behind, value, mask=valued)


@triton.jit
def assemble_backward(
    grad_query,
    grad_key,
    grad_value,
    rotary,
    out_query,
    out_key_value,
    out_rotary_key,
    length,
    heads,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    scale,
    plain: tl.constexpr,
    rotated: tl.constexpr,
    value_width: tl.constexpr,
    plain_block: tl.constexpr,
    half: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of a token's query, keys and values, and of its rotary key, per program, in any order of the axes.

    The rotary key's gradient is the sum over the heads, in FP32 and in their order, `block` of them at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    cos, sin = _factors(rotary, position, rotated, half)
    column = tl.arange(0, plain_block)[None, :]
    turning = tl.arange(0, 2 * half)[None, :]
    behind = tl.arange(0, value_block)[None, :]
    kind = out_query.dtype.element_ty
    width: tl.constexpr = plain + rotated
    both: tl.constexpr = plain + value_width
    query = grad_query + batch * query_batch + position * query_token
    key = grad_key + batch * key_batch + position * key_token
    values = grad_value + batch * value_batch + position * value_token
    total = tl.zeros([block, 2 * half], tl.float32)
    for start in range(0, heads, block):
        row = (start + tl.arange(0, block))[:, None]
        there = row < heads
        far = row.to(tl.int64)
        out = (token * heads + row) * width
        out_both = (token * heads + row) * both

        inside = there & (column < plain)
        value = tl.load(query + far * query_head + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_query + out + column, (value * scale).to(kind), mask=inside)
        value = tl.load(key + far * key_head + column, mask=inside, other=0.0)
        tl.store(out_key_value + out_both + column, value, mask=inside)

        turns = there & (turning < rotated)
        value = tl.load(query + far * query_head + plain + turning, mask=turns, other=0.0).to(tl.float32)
        value = _turn(value, cos * scale, -sin * scale)
        tl.store(out_query + out + plain + turning, value.to(kind), mask=turns)
        total = total + tl.load(key + far * key_head + plain + turning, mask=turns, other=0.0).to(tl.float32)

        valued = there & (behind < value_width)
        value = tl.load(values + far * value_head + behind, mask=valued, other=0.0)
        tl.store(out_key_value + out_both + plain + behind, value, mask=valued)
    # Rounded before it is turned back, as the gradient of the key that all heads share.
    shared = tl.sum(total, axis=0)[None, :].to(kind).to(tl.float32)
    shared = _turn(shared, cos, -sin).to(kind)
    tl.store(out_rotary_key + token * rotated + turning, shared, mask=turning < rotated)
