"""RMSNorm, alone and fused with the residual addition before it, and its backward with the sums of gradients.

T tokens, W width, P partial sums. Matrices have one row per token. Every operation reads and writes each tensor once.

torch's own `_fused_rms_norm` is no alternative. It adds neither the residual stream nor gradients: sums around V3's two
wide norms of a layer, in BF16, move 6 more bytes a value for each tensor added. It stores the reciprocal roots, which a
backward finds in the rows that it reads anyhow, and on the meta device it is many operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import Launch
from .op import fused

WIDEST = 8192
"""Largest width of a row that fits the registers of a program; wider rows are left to torch's operations."""

MOST_PARTS = 256
"""Most partial sums of a gain's gradient: one or two programs for each multiprocessor of a GPU, and below a tenth of
the bytes of V3's activations. A constant, so that sums do not depend on the GPU."""


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of the last dimension, FP32 `[..., 1]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm * norm / x.shape[-1] + eps).rsqrt()


def rms_norm_formula(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * gain` in the format of x, computed in FP32 and rounded once."""
    return (x.float() * reciprocal_rms(x, eps) * gain.float()).to(x.dtype)


def rms_norm_backward_formula(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its format, and of the gain, FP32 `[W]`."""
    grad_x, grad_gain = _wide_backward(grad, x, gain, eps)
    return grad_x.to(x.dtype), grad_gain


def _wide_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd, wide_gain, wide_grad = reciprocal_rms(x, eps), gain.float(), grad.float()
    normed = x.float() * rstd
    product = wide_grad * normed
    along = (product @ wide_gain).unsqueeze(-1) / x.shape[-1]
    return (wide_grad * wide_gain).addcmul_(normed, along, value=-1.0).mul_(rstd), product.sum(0)


def _backward(grads: list[Tensor], passed: Tensor | None, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad = grads[0]
    if len(grads) > 1:
        grad = sum((other.float() for other in grads[1:]), grad.float())
    grad_x, grad_gain = _wide_backward(grad, x, gain, eps)
    if passed is not None:
        grad_x += passed.float()
    return grad_x.to(x.dtype), grad_gain.unsqueeze(0)


def _add(x: Tensor, addend: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + addend
    return total, rms_norm_formula(total, gain, eps)


def blocks(width: int, most: int) -> tuple[int, int]:
    """Rows and columns of the block of a program: all columns, as a power of two, and at most `most` values."""
    columns = 1 << (width - 1).bit_length()
    return max(1, most // columns), columns


def as_rows(x: Tensor) -> Tensor:
    """x `[T, W]` with its values of a row next to each other; rows may have a distance."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _warps(columns: int, of_8192: int) -> int:
    return max(2, of_8192 * columns // WIDEST)


def _launch(x: Tensor, addend: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, (rows, width) = as_rows(x), x.shape
    normed = x.new_empty(rows, width)
    total = normed if addend is None else torch.empty_like(normed)
    block_rows, block = blocks(width, 2048)
    from .triton.norm_kernels import rms_norm as kernel

    Launch(
        kernel,
        -(-rows // block_rows),
        (x, x if addend is None else addend.contiguous(), gain, total, normed, rows, width, x.stride(0)),
        {"eps": eps, "added": addend is not None, "block_rows": block_rows, "block": block},
        num_warps=_warps(block_rows * block, 8),
    ).run()
    return total, normed


def _gpu(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return rms_norm_formula(x, gain, eps) if x.shape[1] > WIDEST else _launch(x, None, gain, eps)[1]


def _gpu_add(x: Tensor, addend: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add(x, addend, gain, eps) if x.shape[1] > WIDEST else _launch(x, addend, gain, eps)


def _gpu_backward(
    grads: list[Tensor], passed: Tensor | None, x: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if x.shape[1] > WIDEST:
        return _backward(grads, passed, x, gain, eps)
    x, (rows, width) = as_rows(x), x.shape
    grad_x, partial = x.new_empty(rows, width), x.new_empty(parts(rows, width), width, dtype=torch.float32)
    block_rows, block = blocks(width, 2048)
    first, *more = (grad.contiguous() for grad in grads)
    second, third = (*more, first, first)[:2]
    from .triton.norm_kernels import rms_norm_backward as kernel

    Launch(
        kernel,
        len(partial),
        (
            *(first, second, third, first if passed is None else passed.contiguous()),
            *(x, gain, grad_x, partial, rows, width, x.stride(0)),
        ),
        {"eps": eps, "grads": len(grads), "passes": passed is not None}
        | {"programs": len(partial), "block_rows": block_rows, "block": block},
        num_warps=_warps(block_rows * block, 16),
    ).run()
    return grad_x, partial


def parts(rows: int, width: int) -> int:
    """P, the number of partial sums of a gain's gradient: of at least one row each."""
    if width > WIDEST:
        return 1
    return min(-(-rows // blocks(width, 2048)[0]), MOST_PARTS)


def _shapes_backward(
    grads: list[Tensor], passed: Tensor | None, x: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(parts(*x.shape), x.shape[1], dtype=torch.float32)


def _gpu_sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    total = partial.new_empty(partial.shape[1], dtype=dtype)
    _launch_sums(partial, total, False)
    return total


def _gpu_add_rows(total: Tensor, partial: Tensor) -> Tensor:
    _launch_sums(partial, total, True)
    return total


def _launch_sums(partial: Tensor, total: Tensor, adds: bool) -> None:
    rows, width = partial.shape
    from .triton.norm_kernels import sum_rows as kernel

    block = 32
    constants = {"adds": adds, "block_rows": 64, "block": block}
    Launch(kernel, -(-width // block), (partial, total, rows, width), constants, num_warps=4).run()


def _gpu_add_three(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    total = torch.empty_like(first, memory_format=torch.contiguous_format)
    block = 2048
    from .triton.norm_kernels import add_three as kernel

    each = (x.contiguous() for x in (first, second, third))
    Launch(kernel, -(-total.numel() // block), (*each, total, total.numel()), {"block": block}, num_warps=4).run()
    return total


rms_norm: Any = fused(
    "rms_norm(Tensor x, Tensor gain, float eps) -> Tensor",
    _gpu,
    rms_norm_formula,
    lambda x, gain, eps: x.new_empty(x.shape),
)
"""x `[T, W]`, rows of any distance, gain `[W]` -> `[T, W]` in the format of x."""

add_rms_norm: Any = fused(
    "add_rms_norm(Tensor x, Tensor addend, Tensor gain, float eps) -> (Tensor, Tensor)",
    _gpu_add,
    _add,
    lambda x, addend, gain, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
"""x and addend `[T, W]` -> their sum, rounded, and its norm."""

rms_norm_backward: Any = fused(
    "rms_norm_backward(Tensor[] grads, Tensor? passed, Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)",
    _gpu_backward,
    _backward,
    _shapes_backward,
)
"""One to three gradients `[T, W]` of the norm of x, each in a format of its own, and the gradient `passed` of x from
elsewhere -> the gradient of x in its format, summed in FP32 and rounded once, and partial sums FP32 `[P, W]` of the
gain's gradient, which are added up by `sum_rows` or `add_rows`."""

sum_rows: Any = fused(
    "sum_rows(Tensor partial, ScalarType dtype) -> Tensor",
    _gpu_sum_rows,
    lambda partial, dtype: partial.sum(0).to(dtype),
    lambda partial, dtype: partial.new_empty(partial.shape[1], dtype=dtype),
)
"""Sums `[W]` over the rows of FP32 `[P, W]`, in a fixed order, rounded to `dtype`."""

add_rows: Any = fused(
    "add_rows(Tensor(a!) total, Tensor partial) -> Tensor(a!)",
    _gpu_add_rows,
    lambda total, partial: total.add_(partial.sum(0)),
    lambda total, partial: total,
)
"""Add the sums over the rows of FP32 `[P, W]` to `total` FP32 `[W]`, in a fixed order and unrounded."""

add_three: Any = fused(
    "add_three(Tensor first, Tensor second, Tensor third) -> Tensor",
    _gpu_add_three,
    lambda first, second, third: (first.float() + second.float() + third.float()).to(first.dtype),
    lambda first, second, third: torch.empty_like(first),
)
"""Sum of three tensors of one shape and format, in FP32 and rounded once."""
