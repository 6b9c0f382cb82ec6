"""The AdamW update of flat tensors in place: one kernel reads each number once and writes it once."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch
from .op import fused

CHUNK = 2**20  # elements that a CPU updates at a time: temporaries stay in the cache and cost no memory
BLOCK = 2048  # elements of a program: BF16 moments move 16 bytes a thread at a time

State = tuple[Tensor, Tensor, Tensor]


def _formula(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    gradient_scale: float,
    correction: float,
    kept: float,
    rate: float,
) -> State:
    for start in range(0, master.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        grad = gradient[piece] * gradient_scale
        # FP32 moments are copied too, because the next lines change the copies in place.
        first = exp_avg[piece].to(torch.float32, copy=True)
        second = exp_avg_sq[piece].to(torch.float32, copy=True)
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        exp_avg[piece] = first
        exp_avg_sq[piece] = second
        denominator = second.div_(correction).sqrt_().add_(eps)
        weights = master[piece]
        weights.mul_(kept)
        weights.addcdiv_(first, denominator, value=-rate)
    return master, exp_avg, exp_avg_sq


def _gpu(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    gradient_scale: float,
    correction: float,
    kept: float,
    rate: float,
) -> State:
    from .triton.adamw_kernels import adamw as kernel

    numbers = (beta2, 1.0 - beta1, 1.0 - beta2, eps, gradient_scale, correction, kept, rate)
    Launch(
        kernel,
        -(-master.numel() // BLOCK),
        (master, gradient, exp_avg, exp_avg_sq, master.numel(), *map(float, numbers)),
        {"block": BLOCK},
        num_warps=8,
    ).run()
    return master, exp_avg, exp_avg_sq


def _shapes(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: float) -> State:
    return master, exp_avg, exp_avg_sq


update = fused(
    "adamw(Tensor(a!) master, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float beta1, float beta2, "
    "float eps, float gradient_scale, float correction, float kept, float rate) "
    "-> (Tensor(a!), Tensor(b!), Tensor(c!))",
    _gpu,
    _formula,
    _shapes,
)
"""AdamW step on flat, contiguous tensors of one length: master and gradient FP32, the moments FP32 or BF16.

The gradient is multiplied by `gradient_scale`. The moments are used unrounded and stored rounded. The weights become
`kept * weights - rate * exp_avg / (sqrt(exp_avg_sq / correction) + eps)`.
"""
