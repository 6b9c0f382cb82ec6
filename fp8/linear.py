"""Linear layers. Models use these layers and never name a number format: a layer computes in the formats of its recipe.

The backward of a layer can leave the gradient of the weight (W) for later; pipelines fill their gaps with this work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..weight_gradients import GradientSink, WeightQueue, now_or_later
from .apex import Accumulate, find_accumulate
from .emulated import QuantizedFunction, QuantizedWeight, keep
from .kept import Kept
from .products import Products
from .quantize import BlockQuantized
from .recipe import LayerEngine, LinearRecipe


class _Layer(nn.Module):
    """State that a plain and a grouped linear layer share.

    `weight_queue` takes the gradient of the weight while it defers; None always computes the gradient at once.
    `gradients` adds up the gradients that a product adds to a sum itself, so that autograd gets none; with None
    autograd gets every gradient.
    """

    def __init__(self, shape: tuple[int, ...], recipe: LinearRecipe | None, num_groups: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight_queue: WeightQueue | None = None
        self.gradients: GradientSink | None = None
        self.recipe = recipe
        self._products = Products() if recipe is None else recipe.products
        self._quantized: QuantizedWeight | None = None
        self._engine: LayerEngine | None = None
        if recipe is not None and recipe.quantises:
            self._quantized = QuantizedWeight(recipe)
            if recipe.backend is not None:
                self._engine = recipe.backend.linear(recipe, num_groups)

    def keep(self, x: Tensor) -> Kept | None:
        """x as the recipe caches it for W, where the cache is another tensor than the layer's input; None elsewhere."""
        return keep(self.recipe, x)

    def _compute(
        self,
        x: Tensor,
        offsets: Tensor | None,
        kept: Kept | None,
        rebuilt: bool = False,
        codes: BlockQuantized | None = None,
        incoming: Callable[[], BlockQuantized | None] | None = None,
    ) -> Tensor:
        """Result of the layer without a backend: in the format of its operands, or with emulated quantisation."""
        later = _later(self.weight_queue, self.weight)
        if self._quantized is None:
            sink = self.gradients if offsets is None else None
            result: Tensor = _LinearFunction.apply(
                x, self.weight, offsets, self._products, later, self.weight_queue, sink
            )
        else:
            grad = torch.is_grad_enabled()
            result = QuantizedFunction.apply(
                x, self.weight, self._quantized, offsets, kept, rebuilt, grad, later, codes, incoming
            )
        return result


class Linear(_Layer):
    """`y = x W^T` without bias: x `[..., in]`, weight `[out, in]`, y `[..., out]`."""

    def __init__(self, in_features: int, out_features: int, recipe: LinearRecipe | None = None) -> None:
        """With `recipe` None the layer computes in the format of weight and input."""
        super().__init__((out_features, in_features), recipe, None)

    def forward(self, x: Tensor, kept: Kept | None = None, rebuilt: bool = False) -> Tensor:
        """`kept` is the result of `keep` for this input. `rebuilt` says that the caller makes x again for the
        backward, so keeping x takes no memory."""
        if self._engine is not None:
            return self._engine(x, self.weight, self.weight_queue, self.gradients, kept, rebuilt)
        return self._compute(x, None, kept, rebuilt)


class GroupedLinear(_Layer):
    """One Linear per expert over rows sorted by expert: x `[R, in]`, weight `[E, out, in]`, y `[R, out]`.

    `offsets` `[E]` int32 are the ends of the experts' rows in `x`: expert e owns rows `offsets[e-1]:offsets[e]`.
    `counts` are the numbers of rows on the host, for a backend that needs them there. Without them the backend copies
    them from the device.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, recipe: LinearRecipe | None = None
    ) -> None:
        """`recipe` as in `Linear`."""
        super().__init__((num_groups, out_features, in_features), recipe, num_groups)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        kept: Kept | None = None,
        counts: Sequence[int] | None = None,
        codes: BlockQuantized | None = None,
        incoming: Callable[[], BlockQuantized | None] | None = None,
    ) -> Tensor:
        """`codes` are the quantised form in which x arrived, if any. `incoming`, called in the backward, gives the
        quantised form of the gradient. Neither is then quantised again, unless a backend does so, to the same values.
        """
        if self._engine is None:
            return self._compute(x, offsets, kept, False, codes, incoming)
        if counts is None:
            counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        return self._engine(x, self.weight, self.weight_queue, self.gradients, kept, False, counts)


class _LinearFunction(torch.autograd.Function):
    """A linear layer in the format of its operands, grouped where there are offsets."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor | None,
        products: Products,
        later: Callable[[Callable[[], Tensor]], Tensor | None],
        queue: WeightQueue | None,
        gradients: GradientSink | None,
    ) -> Tensor:
        ctx.save_for_backward(x, *(() if offsets is None else (offsets,)))
        ctx.weight, ctx.products, ctx.later = weight, products, later  # no saved tensor: hooks need not see the weight
        ctx.queue, ctx.gradients = queue, gradients
        return products.multiply(x, weight.mT, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), weight, products = grads, ctx.weight, ctx.products
        x, *more = ctx.saved_tensors
        offsets = more[0] if more else None
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight, rows, grad_rows = None, x.flatten(0, -2), grad.flatten(0, -2)
        accumulate = None if ctx.gradients is None else _accumulate(x)
        if needs_weight and accumulate is not None:
            now_or_later(ctx.queue, partial(_add, accumulate, rows, grad_rows, weight, ctx.gradients))
        elif needs_weight:
            grad_weight = ctx.later(lambda: products.multiply(grad_rows.t(), rows, offsets))
        grad_x = products.multiply(grad, weight, offsets) if needs_x else None
        return grad_x, grad_weight, None, None, None, None, None


def _accumulate(x: Tensor) -> Accumulate | None:
    """A kernel that adds `dy^T x` to an FP32 sum, where there is one."""
    return find_accumulate() if x.is_cuda and x.dtype == torch.bfloat16 else None


@torch.no_grad()
def _add(accumulate: Accumulate, x: Tensor, dy: Tensor, weight: nn.Parameter, gradients: GradientSink) -> None:
    accumulate(x, dy.contiguous(), gradients.gradient_buffer(weight))
    gradients.arrived(weight)


def _later(queue: WeightQueue | None, weight: Tensor) -> Callable[[Callable[[], Tensor]], Tensor | None]:
    """A function that takes the computation of the weight's gradient in a backward and returns the gradient.

    While the queue defers, the function puts the computation into the queue and returns None.
    """

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
