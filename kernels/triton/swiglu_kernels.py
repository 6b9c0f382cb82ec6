"""SwiGLU times the gate weight, and its backward. One program per row: every sum over a row has one writer."""

# mypy: ignore-errors
# Kernels are in Triton's language, not in Python: their arguments have no types to check.
from __future__ import annotations

from ..launch import load_triton

triton, tl = load_triton()


@triton.jit
def swiglu(
    gate_up,
    weights,
    hidden,
    inner,
    stride,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Make a row of `hidden` `[., inner]` per program from a row of gate and up, gate first, `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, inner, block):
        column = start + tl.arange(0, block)
        inside = column < inner
        gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * stride + inner + column, mask=inside, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        if weighted:
            value = value * tl.load(weights + row)
        tl.store(hidden + row * inner + column, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    grad,
    gate_up,
    weights,
    grad_gate_up,
    grad_weights,
    inner,
    stride,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of a row of gate and up, and of the row's weight, per program."""
    row = tl.program_id(0).to(tl.int64)
    terms = tl.zeros([block], tl.float32)
    for start in range(0, inner, block):
        column = start + tl.arange(0, block)
        inside = column < inner
        gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * stride + inner + column, mask=inside, other=0.0).to(tl.float32)
        pull = tl.load(grad + row * inner + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        grad_up = pull * (gate * sigmoid)
        grad_silu = pull * up
        if weighted:
            terms = terms + grad_up * up
            weight = tl.load(weights + row)
            grad_up = grad_up * weight
            grad_silu = grad_silu * weight
        grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        out = grad_gate_up + row * 2 * inner + column
        tl.store(out, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(out + inner, grad_up.to(grad_gate_up.dtype.element_ty), mask=inside)
    if weighted:
        tl.store(grad_weights + row, tl.sum(terms, axis=0))
