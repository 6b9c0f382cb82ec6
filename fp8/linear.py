"""Linear layers. Models use these and never name a number format: what they compute in follows from the recipe.

Their backward can leave the weight's gradient (W) for later, which is what pipelines fill their gaps with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..phases import WeightQueue


class Linear(nn.Module):
    """`y = x W^T` without bias: x `[..., in]`, weight `[out, in]`, y `[..., out]`.

    `weight_queue` is where the weight's gradient goes while it defers; None always computes it at once.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_queue: WeightQueue | None = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _LinearFunction.apply(x, self.weight, self.weight_queue)
        return result


class GroupedLinear(nn.Module):
    """One Linear an expert over rows sorted by expert: x `[R, in]`, weight `[E, out, in]`, y `[R, out]`.

    `offsets` `[E]` int32 are the ends of the experts' rows in `x`: expert e owns rows `offsets[e-1]:offsets[e]`.
    `weight_queue` as in `Linear`.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.weight_queue: WeightQueue | None = None

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        result: Tensor = _GroupedLinearFunction.apply(x, self.weight, offsets, self.weight_queue)
        return result


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, queue: WeightQueue | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue  # the parameter itself: hooks on saved tensors need not see it
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (x,), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight = None
        if needs_weight:
            grad_weight = _now_or_later(ctx.queue, weight, lambda: grad.flatten(0, -2).t() @ x.flatten(0, -2))
        return (grad @ weight if needs_x else None), grad_weight, None


class _GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, queue: WeightQueue | None) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.weight, ctx.queue = weight, queue
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (x, offsets), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight = None
        if needs_weight:
            grad_weight = _now_or_later(ctx.queue, weight, lambda: F.grouped_mm(grad.t(), x, offs=offsets))
        return (F.grouped_mm(grad, weight, offs=offsets) if needs_x else None), grad_weight, None, None


def _now_or_later(queue: WeightQueue | None, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """The weight's gradient, or None if it was put off."""
    if queue is None or not queue.deferring:
        return compute()
    # As the root of a backward of its own, the parameter runs the hooks that add gradients up.
    queue.put(lambda: torch.autograd.backward(weight, _without_graph(compute)))
    return None


@torch.no_grad()
def _without_graph(compute: Callable[[], Tensor]) -> Tensor:
    return compute()
