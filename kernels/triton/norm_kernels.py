"""RMSNorm with the sums beside it: of the residual stream before it, and of the gradients behind it."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x,
    addend,
    gain,
    total,
    normed,
    rows,
    width,
    stride,
    eps: tl.constexpr,
    added: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """Normalise `block_rows` rows of x `[rows, width]`, `stride` apart, per program.

    With `added`, `total` = x + `addend` is rounded and written too, and normalised in place of x.
    """
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if added:
        value = value + tl.load(addend + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    scale = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
    result = value * reciprocal[:, None] * scale[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward(
    grad,
    second,
    third,
    passed,
    x,
    gain,
    grad_x,
    partial,
    rows,
    width,
    stride,
    eps: tl.constexpr,
    grads: tl.constexpr,
    passes: tl.constexpr,
    programs: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient of x, and of the gain as a partial sum `[width]` per program, from up to three gradients of the result.

    With `passes`, the gradient `passed` of x from elsewhere is added. A program takes `block_rows` rows of every
    `programs * block_rows`, in ascending order: which sums are made depends on the number of rows alone.
    """
    program = tl.program_id(0)
    column = tl.arange(0, block)
    within = column < width
    scale = tl.load(gain + column, mask=within, other=0.0).to(tl.float32)
    sums = tl.zeros([block], tl.float32)
    for start in range(program * block_rows, rows, programs * block_rows):
        row = start + tl.arange(0, block_rows)
        inside = (row < rows)[:, None] & within[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
        pull = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if grads > 1:
            pull = pull + tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        if grads > 2:
            pull = pull + tl.load(third + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(tl.float32)
        reciprocal = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
        unit = value * reciprocal[:, None]
        sums = sums + tl.sum(pull * unit, axis=0)
        pull = pull * scale[None, :]
        along = tl.sum(pull * unit, axis=1) / width
        result = (pull - unit * along[:, None]) * reciprocal[:, None]
        if passes:
            result = result + tl.load(passed + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + program * width + column, sums, mask=within)


@triton.jit(do_not_specialize=["rows"])
def sum_rows(partial, total, rows, width, adds: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr):
    """Add up `block` columns of `partial` `[rows, width]` FP32 per program, and round the sums once; `adds` them to the
    values of `total`."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    within = column < width
    sums = tl.zeros([block], tl.float32)
    for start in range(0, rows, block_rows):
        row = start + tl.arange(0, block_rows)
        inside = (row < rows)[:, None] & within[None, :]
        sums = sums + tl.sum(tl.load(partial + row[:, None] * width + column[None, :], mask=inside, other=0.0), axis=0)
    if adds:
        sums = sums + tl.load(total + column, mask=within, other=0.0).to(tl.float32)
    tl.store(total + column, sums.to(total.dtype.element_ty), mask=within)


@triton.jit
def add_three(first, second, third, total, size, block: tl.constexpr):
    """Add `block` elements of three tensors per program, rounded once."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    value = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    value = value + tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    value = value + tl.load(third + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
