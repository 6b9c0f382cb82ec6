"""The AdamW update."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit
def adamw(
    master,
    gradient,
    exp_avg,
    exp_avg_sq,
    count,
    beta2,
    share1,
    share2,
    eps,
    gradient_scale,
    correction,
    kept,
    rate,
    block: tl.constexpr,
):
    """Update `block` of `count` elements per program; `share1` is 1 - beta1, and `share2` is 1 - beta2."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    grad = tl.load(gradient + place, mask=inside, other=0.0) * gradient_scale
    first = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(master + place, mask=inside, other=0.0)
    first = first + share1 * (grad - first)
    second = second * beta2 + share2 * grad * grad
    denominator = tl.sqrt_rn(tl.div_rn(second, correction)) + eps
    weights = weights * kept - rate * tl.div_rn(first, denominator)
    tl.store(exp_avg + place, first.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + place, second.to(exp_avg_sq.dtype.element_ty), mask=inside)
    tl.store(master + place, weights, mask=inside)
