"""Linear layers. Models use these and never name a number format: what they compute in follows from the recipe.

Their backward can leave the weight's gradient (W) for later, which is what pipelines fill their gaps with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..weight_gradients import GradientSink, WeightQueue, now_or_later
from .apex import Accumulate, find_accumulate
from .emulated import Kept, QuantizedFunction, QuantizedWeight, keep
from .recipe import LinearRecipe

if TYPE_CHECKING:
    from .quantize import BlockQuantized
    from .te.engine import Engine


class Linear(nn.Module):
    """`y = x W^T` without bias: x `[..., in]`, weight `[out, in]`, y `[..., out]`.

    `weight_queue` is where the weight's gradient goes while it defers; None always computes it at once. `gradients`
    adds them up where a product itself does so and passes none to autograd; None passes them anyhow.
    """

    def __init__(self, in_features: int, out_features: int, recipe: LinearRecipe | None = None) -> None:
        """`recipe` None computes in the format of weight and input."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_queue: WeightQueue | None = None
        self.gradients: GradientSink | None = None
        self.recipe = recipe
        self._quantized = None if recipe is None else QuantizedWeight(recipe)
        self._engine = _engine(recipe)

    def forward(self, x: Tensor, kept: Kept | None = None, rebuilt: bool = False) -> Tensor:
        """`kept` is what `keep` gave for this input. `rebuilt` says that whoever made x makes it again for the
        backward, so that keeping it takes no memory."""
        if self._quantized is None:
            result: Tensor = _LinearFunction.apply(x, self.weight, self.weight_queue, self.gradients)
        elif self._engine is not None:
            result = self._engine(x, self.weight, self.weight_queue, self.gradients, kept, rebuilt)
        else:
            grad = torch.is_grad_enabled()
            result = QuantizedFunction.apply(
                x, self.weight, self._quantized, None, kept, rebuilt, grad, _later(self.weight_queue, self.weight)
            )
        return result

    def keep(self, x: Tensor) -> Kept | None:
        """x as the recipe caches it for W, where that is another tensor than the layer's input; None elsewhere."""
        return keep(self.recipe, x)


class GroupedLinear(nn.Module):
    """One Linear an expert over rows sorted by expert: x `[R, in]`, weight `[E, out, in]`, y `[R, out]`.

    `offsets` `[E]` int32 are the ends of the experts' rows in `x`: expert e owns rows `offsets[e-1]:offsets[e]`.
    `counts` are their numbers on the host, for a backend that wants them there; without them it asks the device.
    `weight_queue`, `gradients`, `recipe` and `keep` as in `Linear`.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, recipe: LinearRecipe | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.weight_queue: WeightQueue | None = None
        self.gradients: GradientSink | None = None
        self.recipe = recipe
        self._quantized = None if recipe is None else QuantizedWeight(recipe)
        self._engine = _engine(recipe, num_groups)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        kept: Kept | None = None,
        counts: Sequence[int] | None = None,
        codes: BlockQuantized | None = None,
        incoming: Callable[[], BlockQuantized | None] | None = None,
    ) -> Tensor:
        """`codes` are what x was quantised to before it came here, if it was, and `incoming`, called in the backward,
        gives those of the gradient: then they are not quantised again, unless a backend does so, to the same values.
        """
        if self._quantized is None:
            result: Tensor = _GroupedLinearFunction.apply(x, self.weight, offsets, self.weight_queue)
        elif self._engine is not None:
            if counts is None:
                counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
            result = self._engine(x, self.weight, self.weight_queue, self.gradients, kept, False, counts)
        else:
            grad, later = torch.is_grad_enabled(), _later(self.weight_queue, self.weight)
            result = QuantizedFunction.apply(
                x, self.weight, self._quantized, offsets, kept, False, grad, later, codes, incoming
            )
        return result

    def keep(self, x: Tensor) -> Kept | None:
        return keep(self.recipe, x)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, queue: WeightQueue | None, gradients: GradientSink | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue, ctx.gradients = weight, queue, gradients  # itself: hooks need not see it
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (x,), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight, rows, grad_rows = None, x.flatten(0, -2), grad.flatten(0, -2)
        accumulate = None if ctx.gradients is None else _accumulate(x)
        if needs_weight and accumulate is not None:
            now_or_later(ctx.queue, partial(_add, accumulate, rows, grad_rows, weight, ctx.gradients))
        elif needs_weight:
            grad_weight = _later(ctx.queue, weight)(lambda: grad_rows.t() @ rows)
        return (grad @ weight if needs_x else None), grad_weight, None, None


class _GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, queue: WeightQueue | None) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.weight, ctx.later = weight, _later(queue, weight)
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (x, offsets), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight = None
        if needs_weight:
            grad_weight = ctx.later(lambda: F.grouped_mm(grad.t(), x, offs=offsets))
        return (F.grouped_mm(grad, weight, offs=offsets) if needs_x else None), grad_weight, None, None


def _engine(recipe: LinearRecipe | None, num_groups: int | None = None) -> Engine | None:
    return None if recipe is None or recipe.backend is None else recipe.backend.linear(recipe, num_groups)


def _accumulate(x: Tensor) -> Accumulate | None:
    """What adds `dy^T x` to an FP32 sum in one kernel, where there is such."""
    return find_accumulate() if x.is_cuda and x.dtype == torch.bfloat16 else None


@torch.no_grad()
def _add(accumulate: Accumulate, x: Tensor, dy: Tensor, weight: nn.Parameter, gradients: GradientSink) -> None:
    accumulate(x, dy.contiguous(), gradients.gradient_buffer(weight))
    gradients.arrived(weight)


def _later(queue: WeightQueue | None, weight: Tensor) -> Callable[[Callable[[], Tensor]], Tensor | None]:
    """What takes the computation of the weight's gradient in a backward: it gives the gradient, or None if put off."""

    def gradient(compute: Callable[[], Tensor]) -> Tensor | None:
        if queue is None or not queue.deferring:
            return compute()
        # As the root of a backward of its own, the parameter runs the hooks that add gradients up.
        queue.put(lambda: torch.autograd.backward(weight, _without_graph(compute)))
        return None

    return gradient


@torch.no_grad()
def _without_graph(compute: Callable[[], Tensor]) -> Tensor:
    return compute()
