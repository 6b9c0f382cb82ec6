"""The AdamW update on flat tensors, with moments stored in any format and all arithmetic in FP32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.adamw import update
from ..config import OptimConfig


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
    kept, rate = 1.0 - now.lr * decay, now.lr / correction1
    state = master, gradient, exp_avg, exp_avg_sq
    update(*state, config.beta1, config.beta2, config.eps, now.gradient_scale, correction2, kept, rate)
