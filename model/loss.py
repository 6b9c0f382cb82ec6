"""Output head and cross-entropy in one step, without the logits of a whole micro-batch in FP32.

Tokens are processed in pieces. The logits of a piece are one buffer in the model's format; their gradient overwrites
them in place, a few rows at a time in FP32. The gradients of input and weight are made in the forward, from the logits
of the piece, so nothing is computed twice and no logits are saved for the backward. If BF16 products are widened,
logits and their gradient are FP32 throughout, and the results are rounded.

A pipeline knows in the forward with which gradient the backward of a loss begins, so the gradients are scaled at once.
On a GPU the products of the pieces then add the weight's gradient to the optimizer's sum, and none of V x H waits for
the backward. On a CPU it waits, rounded, so that gradients are added up in the order of the backwards. Under plain
autograd it is saved, in FP32 if there was more than one piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..differentiable import Function, once_differentiable
from ..fp8.products import Products
from ..kernels.add_product import add_product
from ..weight_gradients import GradientSum, seen_by_autograd, sink_of

IGNORED = -100
"""Label of a position without target."""

LOGITS_BYTES = 256 * 2**20  # one piece's logits on a CPU, and FP32 rows at a time on a GPU
GPU_LOGITS_BYTES = 2**30
"""Logits of a piece on a GPU. Each piece reads and writes the weight's FP32 sum: V3's 4,096 tokens are one piece."""
BLOCK_BYTES = 4 * 2**20  # rows turned to FP32 at a time on a CPU: they stay in the cache


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, products: Products | None = None, gradient: float | None = None
) -> Tensor:
    """Return the sum over tokens of -log softmax(hidden W^T)[label], in nats, FP32 scalar.

    hidden `[T, H]`, weight `[V, H]`, labels `[T]` int64, IGNORED for tokens without target. `products`: how BF16
    products are computed; None is this machine's choice. With `gradient` the backward must begin with exactly this
    gradient of the result. The gradient of `weight` then goes to the optimizer's sum, where there is one, on a GPU
    already in the forward.
    """
    training, widens = torch.is_grad_enabled(), (products or Products()).widens(hidden)
    total = sink_of(weight) if training and gradient is not None else None
    return _HeadLoss.apply(hidden, seen_by_autograd(weight, total, hidden), labels, training, widens, gradient, total)


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        training: bool,
        widen: bool,
        gradient: float | None,
        total: GradientSum | None,
    ) -> Tensor:
        # needs_input_grad is set under no_grad too, where no gradient is needed.
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        dtype, on_cpu = hidden.dtype, hidden.device.type == "cpu"
        if widen:
            hidden, weight = hidden.float(), weight.float()
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        vocabulary = weight.shape[0]
        piece = max(1, (LOGITS_BYTES if on_cpu else GPU_LOGITS_BYTES) // (vocabulary * hidden.element_size()))
        for start in range(0, hidden.shape[0], piece):
            rows = slice(start, start + piece)
            logits = F.linear(hidden[rows], weight)
            loss += _loss_and_gradient(logits, labels[rows], needs_hidden or needs_weight or total is not None)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if total is not None and gradient is not None and not on_cpu:
                add_product(total.buffer, logits, hidden[rows], gradient)
            elif needs_weight or total is not None:
                part = torch.mm(logits.t(), hidden[rows])
                # The first piece keeps its format; more pieces are summed in FP32.
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
            del logits  # before the next piece's logits, or both are live at once
        if widen:
            grad_hidden = None if grad_hidden is None else grad_hidden.to(dtype)
            if grad_weight is not None and hidden.shape[0] <= piece:
                grad_weight = grad_weight.to(dtype)
        if gradient is not None:
            grad_hidden, grad_weight = (_scaled(made, gradient, dtype) for made in (grad_hidden, grad_weight))
        if total is not None and not on_cpu:
            total.arrived()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.scaled, ctx.total = dtype, gradient is not None, total
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        if not ctx.scaled:
            grad_hidden, grad_weight = (_scaled(made, grads[0], ctx.dtype) for made in (grad_hidden, grad_weight))
        elif ctx.total is not None and grad_weight is not None:
            ctx.total.add(grad_weight)
            grad_weight = None
        return grad_hidden, grad_weight, None, None, None, None, None


def _scaled(gradient: Tensor | None, factor: Tensor | float, dtype: torch.dtype) -> Tensor | None:
    """Multiply a gradient in FP32: a BF16 factor is off by up to 0.4 %, and so would be every gradient below the head.

    A GPU's kernel multiplies by a number in FP32 itself, so there the gradient is overwritten.
    """
    if gradient is None:
        return None
    if isinstance(factor, float) and gradient.device.type != "cpu":
        return gradient.mul_(factor).to(dtype)
    return (gradient.float() * factor).to(dtype)


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
