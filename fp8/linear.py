"""Linear layers. Models use these layers and never name a number format: a layer computes in the formats of its recipe.

The backward of a layer can leave the gradient of the weight (W) for later; pipelines fill their gaps with this work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..differentiable import Function, once_differentiable
from ..kernels.add_product import add_product
from ..weight_gradients import GradientSink, GradientSum, WeightQueue, keeps_sums, now_or_later, seen_by_autograd
from .emulated import QuantizedFunction, QuantizedWeight, keep
from .kept import Kept
from .products import Products
from .quantize import BlockQuantized
from .recipe import LayerEngine, LinearRecipe


class _Layer(nn.Module):
    """State that a plain and a grouped linear layer share.

    `weight_queue` takes the gradient of the weight while it defers; None always computes the gradient at once.
    `may_wait` False asks for a queue that never defers to a W action (`WeightQueue.of_pairs`).
    `gradients` adds the gradients up, and autograd gets none; with None, and in `plain_autograd`, autograd gets every
    gradient.
    """

    def __init__(self, shape: tuple[int, ...], recipe: LinearRecipe | None, num_groups: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight_queue: WeightQueue | None = None
        self.may_wait = True
        self.gradients: GradientSink | None = None
        self.recipe = recipe
        self._products = Products() if recipe is None else recipe.products
        self._quantized: QuantizedWeight | None = None
        self._engine: LayerEngine | None = None
        self._sum: tuple[nn.Parameter, GradientSink, GradientSum] | None = None
        if recipe is not None and recipe.quantises:
            self._quantized = QuantizedWeight(recipe)
            if recipe.backend is not None:
                self._engine = recipe.backend.linear(recipe, num_groups)

    @property
    def reads_codes(self) -> bool:
        """Whether the layer reads quantised forms of its operands, in place of quantising them again."""
        return self._quantized is not None and self._engine is None

    def keep(self, x: Tensor) -> Kept | None:
        """x as the recipe caches it for W, where the cache is another tensor than the layer's input; None elsewhere."""
        return keep(self.recipe, x)

    def _compute(
        self,
        x: Tensor,
        offsets: Tensor | None,
        kept: Kept | None,
        rebuilt: bool = False,
        counts: Sequence[int] | None = None,
        codes: BlockQuantized | None = None,
        incoming: Callable[[], BlockQuantized | None] | None = None,
    ) -> Tensor:
        """Result of the layer without a backend: in the format of its operands, or with emulated quantisation."""
        if self._quantized is None and not torch.is_grad_enabled():
            return self._products.multiply(x, self.weight.mT, offsets)
        weight, total = self.weight, self._gradient_sum()
        later = _WeightGradient(weight, self.weight_queue, total)
        if self._quantized is not None:
            grad = torch.is_grad_enabled()
            ends = None
            if offsets is not None:
                ends = tuple(offsets.tolist() if counts is None else accumulate(counts))
            quantized: Tensor = QuantizedFunction.apply(
                x, weight, self._quantized, offsets, ends, kept, rebuilt, grad, later, codes, incoming
            )
            return quantized
        seen = seen_by_autograd(weight, total, x)
        result: Tensor = _LinearFunction.apply(x, seen, offsets, counts, self._products, later)
        return result

    def _gradient_sum(self) -> GradientSum | None:
        """Sum to which the weight's gradients are added; None where autograd gets them."""
        weight, sink = self.weight, self.gradients
        if sink is None or not keeps_sums() or not weight.requires_grad:
            return None
        if self._sum is None or self._sum[0] is not weight or self._sum[1] is not sink:
            self._sum = weight, sink, GradientSum(sink.gradient_buffer(weight), partial(sink.arrived, weight))
        return self._sum[2]


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
    `counts` are the numbers of rows on the host, for a backend that needs them there, and for gradients of the weight
    that are added to a sum on a GPU. Where they are needed and not given, they are copied from the device.
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
            return self._compute(x, offsets, kept, False, counts, codes, incoming)
        sizes = row_counts(offsets, counts)
        return self._engine(x, self.weight, self.weight_queue, self.gradients, kept, False, sizes)


class _LinearFunction(Function):
    """A linear layer in the format of its operands, grouped where there are offsets."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor | None,
        counts: Sequence[int] | None,
        products: Products,
        later: _WeightGradient,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.products, ctx.later = weight, products, later  # no saved tensor: hooks need not see the weight
        ctx.offsets, ctx.counts = offsets, counts
        return products.multiply(x, weight.mT, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), weight, products = grads, ctx.weight, ctx.products
        (x,), offsets = ctx.saved_tensors, ctx.offsets
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        later, grad_weight, grad_rows = ctx.later, None, grad.flatten(0, -2)
        rows = x.detach().flatten(0, -2)  # a deferred W would otherwise hold the graph that x came from
        if later.total is not None and x.device.type != "cpu":
            later.add_products(rows, grad_rows, offsets, ctx.counts)
        elif needs_weight or later.total is not None:
            grad_weight = later(partial(products.multiply, grad_rows.t(), rows, offsets))
        grad_x = products.multiply(grad, weight, offsets) if needs_x else None
        return grad_x, grad_weight, None, None, None, None


class _WeightGradient:
    """Place of one use's weight gradient: the sum `total` or autograd, at once or when the queue is drained."""

    __slots__ = ("queue", "total", "weight")

    def __init__(self, weight: nn.Parameter, queue: WeightQueue | None, total: GradientSum | None) -> None:
        self.weight, self.queue, self.total = weight, queue, total

    @property
    def deferring(self) -> bool:
        """Whether the computation of the gradient waits in the queue."""
        return self.queue is not None and self.queue.deferring

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """Take the computation of the gradient, in a backward. Returns the gradient if autograd is to have it now."""
        if self.total is not None:
            now_or_later(self.queue, partial(_add, compute, self.total))
        elif self.queue is not None and self.deferring:
            # As the root of a backward of its own, the parameter runs the hooks that add gradients up.
            self.queue.put(lambda: torch.autograd.backward(self.weight, _without_graph(compute)))
        else:
            return compute()
        return None

    def add_products(self, x: Tensor, dy: Tensor, offsets: Tensor | None, counts: Sequence[int] | None) -> None:
        """Let products add the gradient to the sum: one, or one for each expert with rows."""
        assert self.total is not None
        now_or_later(self.queue, partial(_add_products, x, dy, offsets, counts, self.total))


@torch.no_grad()
def _without_graph(compute: Callable[[], Tensor]) -> Tensor:
    return compute()


@torch.no_grad()
def _add(compute: Callable[[], Tensor], total: GradientSum) -> None:
    total.add(compute())


def _add_products(
    x: Tensor, dy: Tensor, offsets: Tensor | None, counts: Sequence[int] | None, total: GradientSum
) -> None:
    if offsets is None:
        add_product(total.buffer, dy, x, 1.0)
    else:
        sizes = list(row_counts(offsets, counts))
        for expert, of_dy, of_x, size in zip(total.parts, dy.split(sizes), x.split(sizes), sizes, strict=True):
            if size:
                add_product(expert, of_dy, of_x, 1.0)
    total.arrived()


def row_counts(offsets: Tensor, counts: Sequence[int] | None) -> Sequence[int]:
    """Numbers of the experts' rows on the host: `counts`, or copied from the device."""
    return offsets.diff(prepend=offsets.new_zeros(1)).tolist() if counts is None else counts
