"""Output head and cross-entropy in one step, without the logits of a whole micro-batch in FP32.

Tokens are processed in pieces. The logits of a piece are one buffer in the model's format; their gradient overwrites
them in place, a few rows at a time in FP32. The gradients of input and weight are made in the forward, from the logits
of the piece, so nothing is computed twice and no logits are saved for the backward. The weight's gradient is saved:
V x H, in FP32 if there was more than one piece. If BF16 products are widened, logits and their gradient are FP32
throughout, and the results are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..fp8.products import Products

IGNORED = -100
"""Label of a position without target."""

LOGITS_BYTES = 256 * 2**20  # one piece's logits
BLOCK_BYTES = 4 * 2**20  # rows turned to FP32 at a time: they stay in the cache


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, products: Products | None = None) -> Tensor:
    """Return the sum over tokens of -log softmax(hidden W^T)[label], in nats, FP32 scalar.

    hidden `[T, H]`, weight `[V, H]`, labels `[T]` int64, IGNORED for tokens without target. `products`: how BF16
    products are computed; None is this machine's choice.
    """
    return _HeadLoss.apply(hidden, weight, labels, torch.is_grad_enabled(), (products or Products()).widens(hidden))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, training: bool, widen: bool) -> Tensor:
        # needs_input_grad is set under no_grad too, where no gradient is needed.
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        dtype = hidden.dtype
        if widen:
            hidden, weight = hidden.float(), weight.float()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        vocabulary = weight.shape[0]
        piece = max(1, LOGITS_BYTES // (vocabulary * hidden.element_size()))
        for start in range(0, hidden.shape[0], piece):
            rows = slice(start, start + piece)
            logits = F.linear(hidden[rows], weight)
            total += _loss_and_gradient(logits, labels[rows], needs_hidden or needs_weight)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if needs_weight:
                part = torch.mm(logits.t(), hidden[rows])
                # The first piece keeps its format; more pieces are summed in FP32.
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
            del logits  # before the next piece's logits, or both are live at once
        if widen:
            grad_hidden = None if grad_hidden is None else grad_hidden.to(dtype)
            if grad_weight is not None and hidden.shape[0] <= piece:
                grad_weight = grad_weight.to(dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Multiplied in FP32: a BF16 factor is off by up to 0.4 %, and so would be every gradient below the head.
        return (
            None if grad_hidden is None else (grad_hidden.float() * grads[0]).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight.float() * grads[0]).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _loss_and_gradient(logits: Tensor, labels: Tensor, needs_gradient: bool) -> Tensor:
    """Loss summed over the rows; with `needs_gradient` the logits `[T, V]` are overwritten by softmax - one-hot."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    block = max(1, (BLOCK_BYTES if logits.device.type == "cpu" else LOGITS_BYTES) // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], block):
        rows = logits[start : start + block]
        wanted = labels[start : start + block].unsqueeze(1)
        target = wanted.clamp_min(0)
        log_p = F.log_softmax(rows, -1, dtype=torch.float32)
        total -= log_p.gather(1, target).masked_fill_(wanted == IGNORED, 0.0).sum()
        if needs_gradient:
            p = log_p.exp_()
            p.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
            rows.copy_(p.masked_fill_(wanted == IGNORED, 0.0))
    return total
