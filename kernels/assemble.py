"""Rotation and layout of queries, keys and values for attention, and its backward, each in one pass.

B sequences, S tokens of a sequence, A heads, N plain width, R rotated width, V value width. Each tensor is read and
written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import Launch
from .op import fused

BLOCK = 16
"""Heads that a program takes at a time."""


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Multiply neighbouring pairs of x `[..., R]`, read as complex numbers, by `rotary` complex64 `[..., R/2]`."""
    # FP32 is copied too: a slice of odd width cannot be viewed as complex numbers.
    pairs = torch.view_as_complex(x.to(torch.float32, copy=True).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


def assemble_formula(
    query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of attention with heads before positions in memory too, as CPUs multiply them: see `assemble`."""
    batch, length, heads, width = query.shape
    plain = width - rotary_key.shape[-1]
    out_query, out_key = (query.new_empty(batch, heads, length, width) for _ in range(2))
    torch.mul(query[..., :plain].transpose(1, 2), scale, out=out_query[..., :plain])
    # A factor of magnitude `scale` rotates and scales in one product.
    out_query[..., plain:] = rotate(query[..., plain:], rotary[:, None] * scale).transpose(1, 2)
    out_key[..., :plain] = key_value[..., :plain].transpose(1, 2)
    out_key[..., plain:] = rotate(rotary_key, rotary).unsqueeze(1)
    value = key_value.new_empty(batch, heads, length, key_value.shape[-1] - plain)
    return out_query, out_key, value.copy_(key_value[..., plain:].transpose(1, 2))


def assemble_backward_formula(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values, and the rotary key: see `assemble_backward`."""
    plain, back = grad_query.shape[-1] - 2 * rotary.shape[-1], rotary.conj()
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in (grad_query, grad_key, grad_value))
    out_query = grad_query.new_empty(grad_query.shape)
    torch.mul(grad_query[..., :plain], scale, out=out_query[..., :plain])
    out_query[..., plain:] = rotate(grad_query[..., plain:], back[:, None] * scale)
    out_key_value = torch.cat((grad_key[..., :plain], grad_value), -1)
    shared = grad_key[..., plain:].sum(2, dtype=torch.float32).to(grad_key.dtype)
    return out_query, out_key_value, rotate(shared, back)


def _by_token(x: Tensor) -> Tensor:
    """x `[B, S, ..., D]` whose tokens lie in memory at one distance, and each in one piece."""
    inner = x[0, 0].is_contiguous() if x.numel() else True
    return x if inner and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


def _constants(plain: int, rotated: int, value: int) -> dict[str, int]:
    def power(size: int) -> int:
        return 1 << max(0, size - 1).bit_length()

    widths = {"plain": plain, "rotated": rotated, "value_width": value}
    return widths | {"plain_block": power(plain), "half": power(rotated // 2), "value_block": power(value)}


def _gpu(
    query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key_value, rotary_key = _by_token(query), _by_token(key_value), _by_token(rotary_key)
    batch, length, heads, width = query.shape
    rotated = rotary_key.shape[-1]
    results = _shapes(query, key_value, rotary_key, rotary, scale)
    parts = -(-heads // BLOCK)
    from .triton.assemble_kernels import assemble as kernel

    Launch(
        kernel,
        batch * length * parts,
        (
            *(query, key_value, rotary_key, torch.view_as_real(rotary.contiguous()), *results, length, heads, parts),
            *(query.stride(1), key_value.stride(1), rotary_key.stride(1), scale),
        ),
        {**_constants(width - rotated, rotated, results[2].shape[-1]), "block": BLOCK},
        num_warps=4,
    ).run()
    return results


def _shapes(
    query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    plain = query.shape[-1] - rotary_key.shape[-1]
    value = key_value.new_empty(*key_value.shape[:-1], key_value.shape[-1] - plain)
    return query.new_empty(query.shape), query.new_empty(query.shape), value


def _gpu_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads: list[Tensor] = [x if x.stride(-1) == 1 else x.contiguous() for x in (grad_query, grad_key, grad_value)]
    batch, heads, length, width = grad_query.shape
    rotated = 2 * rotary.shape[-1]
    results = _shapes_backward(grad_query, grad_key, grad_value, rotary, scale)
    strides = [x.stride(axis) for x in grads for axis in (0, 2, 1)]
    from .triton.assemble_kernels import assemble_backward as kernel

    Launch(
        kernel,
        batch * length,
        (*grads, torch.view_as_real(rotary.contiguous()), *results, length, heads, *strides, scale),
        {**_constants(width - rotated, rotated, grad_value.shape[-1]), "block": BLOCK},
        num_warps=4,
    ).run()
    return results


def _shapes_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, rotary: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = grad_query.shape
    rotated = 2 * rotary.shape[-1]
    both = width - rotated + grad_value.shape[-1]
    return (
        grad_query.new_empty(batch, length, heads, width),
        grad_query.new_empty(batch, length, heads, both),
        grad_query.new_empty(batch, length, rotated),
    )


assemble: Any = fused(
    "assemble(Tensor query, Tensor key_value, Tensor rotary_key, Tensor rotary, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _gpu,
    lambda *given: tuple(x.transpose(1, 2).contiguous() for x in assemble_formula(*given)),
    _shapes,
)
"""Query `[B, S, A, N+R]`, keys and values `[B, S, A, N+V]`, the one rotary key `[B, S, R]` of all heads and factors
complex64 `[S, R/2]` -> query times `scale` and key `[B, S, A, N+R]`, value `[B, S, A, V]`, in the order in memory that
the attention kernels of GPUs read."""

assemble_backward: Any = fused(
    "assemble_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor rotary, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _gpu_backward,
    assemble_backward_formula,
    _shapes_backward,
)
"""Gradients of query and key `[B, A, S, N+R]` and value `[B, A, S, V]`, in any order in memory -> gradients of query
`[B, S, A, N+R]`, of keys and values `[B, S, A, N+V]`, and of the rotary key `[B, S, R]`."""
