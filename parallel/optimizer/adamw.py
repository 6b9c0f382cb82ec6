"""The AdamW update on flat tensors, with moments stored in any format and all arithmetic in FP32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import OptimConfig

CHUNK = 2**20  # elements updated at a time: temporaries stay in the cache and cost no memory


@dataclass(frozen=True)
class Update:
    """Numbers of one optimizer step. `step` counts from 1; `gradient_scale` is the clipping factor."""

    lr: float
    step: int
    gradient_scale: float = 1.0


@torch.no_grad()
def adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    config: OptimConfig,
    decay: float,
    now: Update,
) -> None:
    """AdamW step (Loshchilov & Hutter, algorithm 2) in place on flat tensors of one length.

    master and gradient FP32; the moments FP32 or BF16: the update uses them unrounded and stores them rounded.
    """
    correction1 = 1.0 - config.beta1**now.step
    correction2 = 1.0 - config.beta2**now.step
    for start in range(0, master.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        grad = gradient[piece] * now.gradient_scale
        # FP32 moments are copied too, because the next lines change the copies in place.
        first = exp_avg[piece].to(torch.float32, copy=True)
        second = exp_avg_sq[piece].to(torch.float32, copy=True)
        first.lerp_(grad, 1.0 - config.beta1)
        second.mul_(config.beta2).addcmul_(grad, grad, value=1.0 - config.beta2)
        exp_avg[piece] = first
        exp_avg_sq[piece] = second
        denominator = second.div_(correction2).sqrt_().add_(config.eps)
        weights = master[piece]
        weights.mul_(1.0 - now.lr * decay)
        weights.addcdiv_(first, denominator, value=-now.lr / correction1)
