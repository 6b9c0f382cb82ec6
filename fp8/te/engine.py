"""A linear layer of ours computed by `te.Linear` or `te.GroupedLinear`.

The library's module owns no weights: it uses our parameter, or views of our stack of experts. So names, shapes and
checkpoints are the same as with any other backend. The engine uses the module in this way:

- The product itself accumulates weight gradients in FP32 (`fuse_wgrad_accumulation`), in the optimizer's buffer. No
  call passes `is_first_microbatch=True`, which would overwrite the sum in the buffer.
  Autograd sees no gradient of the weight, so each added gradient is reported to the optimizer.
- Weight gradients are always computed separately (`delay_wgrad_compute`): at once, or when the pipeline drains its
  queue. Each backward has one `backward_dw`. The library keeps its operands first in, first out. If a schedule drained
  two micro-batches in the opposite order, only the order of sums would differ.
- The quantised weight is made once per step, when the weight has changed (see `_Module.quantised_once`).
- For the weight's gradient the layer's input is restored from the recipe's cache, and the library then quantises it
  along the tokens, as V3 does (§3.5.2). Without a cache the library keeps its own FP8 copy, made from the input itself.
  Where the input is made again for the backward, the library keeps no copy (`save_original_input`).
- Rows are padded with zeros to a multiple that the GPU accepts. Rows of experts arrive padded, see `Recipe.alignment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...differentiable import Function, once_differentiable
from ...settings import UsageError, nearest_multiples
from ...weight_gradients import GradientSink, WeightQueue, now_or_later
from ..kept import Kept
from ..recipe import LinearRecipe
from ..saved_tensors import memory_of
from . import translate as recipes
from .library import Library
from .limits import INSTEAD


class Engine:
    """One layer, plain or of `num_groups` experts, computed with Transformer Engine."""

    def __init__(self, library: Library, recipe: LinearRecipe, num_groups: int | None = None) -> None:
        self.library = library
        self.recipe = recipes.make(library, recipe)
        self.monitor = recipe.input.monitor
        self.num_groups = num_groups
        self._module: _Module | None = None
        self._anchor: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        weight: nn.Parameter,
        queue: WeightQueue | None,
        sink: GradientSink | None,
        kept: Kept | None = None,
        rebuilt: bool = False,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return y of x `[..., K]` and weight `[N, K]`, or of rows `[R, K]` and a stack `[E, N, K]` with E `counts`.

        `queue` takes the weight's gradient while it defers. Without a `sink` it goes to `weight.grad` as usual.
        `kept` and `rebuilt` as in `Linear`. Raises UsageError for widths or types that the library does not take.
        """
        assert self.monitor.observer is None, "an observer does not see what the library quantises"
        module = self._module_for(weight, sink)
        rows, count = x.flatten(0, -2).contiguous(), x.shape[:-1].numel()
        short = -count % self.library.alignment
        if counts is not None:
            faulty = [size for size in counts if size % self.library.alignment]
            assert not faulty, f"rows of experts come in multiples of {self.library.alignment}, not {faulty[0]}"
            assert sum(counts) == count, f"{count} rows, and the experts' make {sum(counts)}"
        elif short:
            rows = F.pad(rows, (0, 0, 0, short))
        if torch.is_grad_enabled() and weight.requires_grad:
            y = self._with_backward(module, rows, counts, queue, kept, rebuilt, short)
        else:
            y = module.forward(rows, counts, keep_original=False)
        if short:  # a slice's backward copies
            y = y[:count]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _with_backward(
        self,
        module: _Module,
        rows: Tensor,
        counts: Sequence[int] | None,
        queue: WeightQueue | None,
        kept: Kept | None,
        rebuilt: bool,
        short: int,
    ) -> Tensor:
        if self._anchor is None:
            self._anchor = torch.zeros((), requires_grad=True, device=rows.device)
        empty = rows.shape[0] == 0

        def weight_gradient() -> None:
            if not empty:
                module.backward_dw()
            module.report_gradient()

        def after_backward() -> None:
            if not empty and queue is not None and queue.deferring:
                module.drop_used_codes()
            now_or_later(queue, weight_gradient)

        rows = _AfterBackward.apply(rows, self._anchor, after_backward)
        if empty:  # no product, but the same autograd graph as with rows
            return rows[:, :1].expand(-1, module.shape[-2])
        if kept is None:
            return module.forward(rows, counts, keep_original=rebuilt)
        held = _Held(rows)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
            y = module.forward(rows, counts, keep_original=True)
        restore = kept.restore

        def hand_in(*saved: Tensor) -> None:
            original = restore(*saved).flatten(0, -2)
            held.hand_in(F.pad(original, (0, 0, 0, short)) if short else original)

        return _BeforeBackward.apply(y, hand_in, *kept.tensors)

    def _module_for(self, weight: nn.Parameter, sink: GradientSink | None) -> _Module:
        """Return the library's module, made at the first call: only then is the weight's memory and format final."""
        if self._module is None or self._module.weight is not weight or self._module.sink is not sink:
            self._module = _Module(self.library, self.recipe, weight, sink, self.num_groups)
        return self._module


class _Module:
    """The library's module with our weight in it."""

    def __init__(
        self,
        library: Library,
        recipe: Any,
        weight: nn.Parameter,
        sink: GradientSink | None,
        num_groups: int | None,
    ) -> None:
        *_, outputs, inputs = self.shape = weight.shape
        _check(library, weight)
        self.library, self.recipe, self.weight, self.sink = library, recipe, weight, sink
        common: dict[str, Any] = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": False,
            "params_dtype": weight.dtype,
            "device": "meta",
            "fuse_wgrad_accumulation": True,
            "delay_wgrad_compute": True,
        }
        self.buffer = torch.zeros_like(weight, dtype=torch.float32) if sink is None else sink.gradient_buffer(weight)
        assert self.buffer.shape == weight.shape and self.buffer.dtype == torch.float32
        assert self.buffer.data_ptr() % 16 == 0, "cuBLAS writes 16 bytes at once"
        self.grouped = num_groups is not None
        if num_groups is None:
            self.te = library.pytorch.Linear(**common)
            self.te.weight = weight
            weight.main_grad = self.buffer  # type: ignore[attr-defined]
        else:
            self.te = library.pytorch.GroupedLinear(num_gemms=num_groups, **common)
            # The environment can choose a product that needs counts on the device and 128 rows; 2.9 has no argument for
            # it.
            self.te.use_grouped_tensor = False
            for index, (matrix, buffer) in enumerate(zip(weight.detach(), self.buffer, strict=True)):
                part = nn.Parameter(matrix, weight.requires_grad)  # in the stack's memory
                part.main_grad = buffer  # type: ignore[attr-defined]
                setattr(self.te, f"weight{index}", part)
        self._quantised: dict[str, Any] | None = getattr(self.te, "_fp8_workspaces", None)
        self._seen_version = weight._version

    def forward(self, rows: Tensor, counts: Sequence[int] | None, keep_original: bool) -> Tensor:
        """`keep_original` saves the input itself for the weight's gradient, not the library's FP8 copy."""
        if rows.shape[0] == 0:
            return rows.new_empty(0, self.shape[-2])
        self.te.save_original_input = keep_original
        first = {"is_first_microbatch": self.quantised_once()}
        with self.library.pytorch.autocast(enabled=True, recipe=self.recipe):
            if counts is None:
                return self.te(rows, **first)
            return self.te(rows, list(counts), **first)

    def quantised_once(self) -> bool | None:
        """Value of `is_first_microbatch` for the next call.

        With False the library uses its quantised weight, or makes one where it has none, and adds to the gradient. True
        would overwrite the gradient. So no call passes True; the quantised weight is dropped when ours has changed.
        Micro-batches in flight then share one quantised weight; with None each would hold its own until its backward.
        Where no gradient will follow, the weight is quantised for fprop alone. A later backward must not use this copy,
        so there the value is None. The value is also None where a release keeps the quantised weights elsewhere.
        """
        if self._quantised is None or not torch.is_grad_enabled():
            return None
        if self.weight._version != self._seen_version:
            self._quantised.clear()
            self._seen_version = self.weight._version
        return False

    def backward_dw(self) -> None:
        """Compute the oldest weight gradient that a backward has left to do."""
        with torch.no_grad():
            self.te.backward_dw()

    def drop_used_codes(self) -> None:
        """Drop the copy of the newest gradient that its dgrad has used: the library leaves both in its store.

        Half of the gradient's bytes then wait for the weight's gradient. A release with another store keeps both.
        """
        waiting = getattr(getattr(getattr(self.te, "wgrad_store", None), "context", None), "queue", None)
        if not waiting:
            return
        (_, gradients, *_), _ = waiting[-1]
        for gradient in gradients if isinstance(gradients, list | tuple) else (gradients,):
            if hasattr(gradient, "update_usage"):
                gradient.update_usage(rowwise_usage=False, columnwise_usage=True)

    def report_gradient(self) -> None:
        """Report an added gradient to the optimizer, or give it to autograd."""
        if self.sink is not None:
            self.sink.arrived(self.weight)
            return
        gradient = self.buffer.to(self.weight.dtype)
        self.buffer.zero_()
        # As the root of a backward of its own, the parameter runs the hooks that add gradients up.
        torch.autograd.backward(self.weight, gradient)


def _check(library: Library, weight: Tensor) -> None:
    unit = library.alignment
    if weight.dtype != torch.bfloat16:
        raise UsageError(
            f"Transformer Engine quantises weights in BF16 here, and these are {weight.dtype} (precision.high); "
            f"{INSTEAD}"
        )
    for name, width in (("inputs", weight.shape[-1]), ("outputs", weight.shape[-2])):
        if width % unit:
            raise UsageError(
                f"a linear layer of {weight.shape[-1]} inputs and {weight.shape[-2]} outputs: on this GPU Transformer "
                f"Engine takes {name} in multiples of {unit} (nearest: {nearest_multiples(width, unit)}); {INSTEAD}"
            )


class _AfterBackward(Function):
    """Identity whose backward runs right after the backward of the operations on its result, and calls `then`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then  # the anchor makes the result require a gradient even where x does not
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.then()
        return grads[0], None, None


class _BeforeBackward(Function):
    """Identity whose backward runs right before the backward of y's operation, and calls `first(*saved)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, first: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.first = first
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.first(*ctx.saved_tensors)
        return grads[0], None, *([None] * (len(ctx.needs_input_grad) - 2))


class _Held:
    """Hooks on the library's saved tensors: its input is dropped, and the backward gets a value handed in for it."""

    def __init__(self, x: Tensor) -> None:
        self._address = memory_of(x)
        self._value: Tensor | None = None

    def hand_in(self, value: Tensor) -> None:
        self._value = value

    def pack(self, tensor: Tensor) -> Tensor | None:
        return None if memory_of(tensor) == self._address else tensor

    def unpack(self, saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        value, self._value = self._value, None
        assert value is not None, "the input was read twice, or before the backward of the output"
        return value
