"""Transformer Engine on shapes alone: what its modules allocate, launch and save, without values.

Read in release 2.20.2. A dry run puts `library()` in the place of the imported package, so the engines, the optimizer
and the attention of a run are the real ones.

- A quantisation in tiles of (1, 128) writes codes, and scales in FP32, padded to a multiple of four along the rows. The
  copy along the rows is transposed and has scales of its own. One kernel writes both. A weight has tiles of 128 x 128.
- A grouped layer quantises and multiplies expert by expert, with one kernel each. Experts without rows have none.
- For the weight's gradient a layer saves the transposed codes of its input, or the input itself with
  `save_original_input`, which the backward quantises. With `delay_wgrad_compute` both operands wait in a store.
- The product of the weight's gradient adds to `main_grad`.

Quantisations and products are operations of the meta device: `counterflow::te_quantize`, `counterflow::te_product`,
`counterflow::te_attention`, `counterflow::te_attention_backward` and `counterflow::te_adam`. Workspaces of cuBLAS and
cuDNN are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from queue import Queue
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..fp8.te.library import CHECKED, Library
from ..kernels.op import shapes_only


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _scales(rows: int, columns: int, transposed: bool, square: bool) -> tuple[int, int]:
    """Shape of the scales of a matrix `[rows, columns]`, or of its transposed copy."""
    if square:
        down, across = -(-rows // 128), -(-columns // 128)
        return (across, _round_up(down, 4)) if transposed else (down, _round_up(across, 4))
    return (-(-rows // 128), _round_up(columns, 4)) if transposed else (-(-columns // 128), _round_up(rows, 4))


def _quantize_shapes(x: Tensor, rowwise: bool, columnwise: bool, square: bool) -> list[Tensor]:
    rows, columns = x.shape
    made: list[Tensor] = []
    for wanted, transposed in ((rowwise, False), (columnwise, True)):
        if wanted:
            shape = (columns, rows) if transposed else (rows, columns)
            made.append(x.new_empty(shape, dtype=torch.uint8))
            made.append(x.new_empty(_scales(rows, columns, transposed, square), dtype=torch.float32))
    return made


def _attention_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return value.new_empty(value.shape), query.new_empty(batch, heads, length, 1, dtype=torch.float32)


def _attention_backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_quantize = shapes_only(
    "te_quantize(Tensor x, bool rowwise, bool columnwise, bool square) -> Tensor[]", _quantize_shapes
)
_product = shapes_only(
    "te_product(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor(a!) out, int contracted, bool add) "
    "-> Tensor(a!)",
    lambda a, a_scale, b, b_scale, out, contracted, add: out,
)
_attention = shapes_only("te_attention(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)", _attention_shapes)
_attention_backward = shapes_only(
    "te_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics) "
    "-> (Tensor, Tensor, Tensor)",
    _attention_backward_shapes,
)
_adam = shapes_only(
    "te_adam(Tensor(a!) master, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq) -> Tensor(a!)",
    lambda master, gradient, exp_avg, exp_avg_sq: master,
)


def flops(name: str, arguments: tuple[Any, ...]) -> float:
    """Floating-point operations of a call of the operation `name`, without its namespace; 0 for those that multiply
    no matrices. Causal attention counts half of its scores, and five products in the backward for two."""
    if name == "te_product":
        out, contracted = arguments[4], arguments[5]
        return 2.0 * out.numel() * contracted
    if name in ("te_attention", "te_attention_backward"):
        query, value = (arguments[0], arguments[2]) if name == "te_attention" else (arguments[1], arguments[3])
        batch, length, heads, width = query.shape
        forward = float(batch) * heads * length * length * (width + value.shape[-1])
        return forward if name == "te_attention" else 2.5 * forward
    return 0.0


class _Codes(NamedTuple):
    """A quantised matrix: codes and scales along the rows, then of the transposed copy."""

    rows: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, x: Tensor, rowwise: bool, columnwise: bool, square: bool = False) -> _Codes:
        made = tuple(_quantize(x, rowwise, columnwise, square))
        return cls(made[:2], made[2:]) if rowwise else cls((), made)


class _Waiting:
    """A quantised operand in the store of weight gradients, of which one copy can be dropped."""

    def __init__(self, codes: _Codes) -> None:
        self.codes = codes

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        rows, columns = self.codes
        self.codes = _Codes(() if rowwise_usage is False else rows, () if columnwise_usage is False else columns)


class _Store:
    """Operands of weight gradients, first in, first out, as `WeightGradStore`."""

    def __init__(self) -> None:
        self.context: Queue[tuple[list[Any], Callable[..., None]]] = Queue()

    def put(self, operands: list[Any], compute: Callable[..., None]) -> None:
        self.context.put((operands, compute))

    def pop(self) -> None:
        operands, compute = self.context.get_nowait()
        compute(*operands)


@dataclass(frozen=True)
class _Call:
    """State of a forward for its backward, except for tensors."""

    module: _Module
    counts: tuple[int, ...]
    original: bool
    square: bool  # of the weight


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, operands: list[_Codes], *weights: Tensor) -> Tensor:
        module, parts = call.module, x.detach().split(call.counts)
        inputs = [_Codes.of(part, True, not call.original) for part in parts if part.numel()]
        y = x.new_empty(x.shape[0], module.out_features)
        _multiply(inputs, [w.rows for w in _of_rows(operands, call.counts)], y, call.counts, module.in_features)
        saved = (x,) if call.original else tuple(t for codes in inputs for t in codes.columns)
        ctx.save_for_backward(*saved, *(t for codes in operands for t in codes.columns))
        ctx.call, ctx.weights, ctx.needs_x = call, weights, x.requires_grad
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call, weights, grad = ctx.call, ctx.weights, grads[0].contiguous()
        module, counts = call.module, call.counts
        used = sum(1 for count in counts if count)
        saved = ctx.saved_tensors
        kept = [_Codes((), saved[i : i + 2]) for i in range(0, 0 if call.original else 2 * used, 2)]
        columns = saved[1 if call.original else 2 * used :]
        gradients = [_Codes.of(part, True, True) for part in grad.split(counts) if part.numel()]
        if call.original:
            kept = [_Codes.of(part, False, True) for part in saved[0].detach().split(counts) if part.numel()]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(grad.shape[0], module.in_features)
            operands = [_Codes((), columns[i : i + 2]) for i in range(0, len(columns), 2)]
            _multiply(gradients, [w.columns for w in _of_rows(operands, counts)], grad_x, counts, module.out_features)
        waiting = [[_Waiting(codes) for codes in group] for group in (kept, gradients)]
        module.wgrad_store.put(waiting, partial(_add, weights, counts))
        return grad_x, None, None, *(None for _ in weights)


def _of_rows(operands: list[_Codes], counts: tuple[int, ...]) -> list[_Codes]:
    """Weights of the groups that have rows."""
    return [codes for codes, count in zip(operands, counts, strict=True) if count]


def _multiply(
    left: list[_Codes], right: list[tuple[Tensor, ...]], out: Tensor, counts: tuple[int, ...], contracted: int
) -> None:
    parts = [part for part in out.split(counts) if part.numel()]
    for codes, weight, part in zip(left, right, parts, strict=True):
        _product(*codes.rows, *weight, part, contracted, False)


def _add(
    weights: tuple[Tensor, ...], counts: tuple[int, ...], inputs: list[_Waiting], gradients: list[_Waiting]
) -> None:
    used = [(weight, count) for weight, count in zip(weights, counts, strict=True) if count]
    for (weight, count), x, dy in zip(used, inputs, gradients, strict=True):
        _product(*dy.codes.columns, *x.codes.columns, weight.main_grad, count, True)  # type: ignore[attr-defined]


class _Module(nn.Module):
    """State that Linear and GroupedLinear share."""

    def __init__(self, in_features: int, out_features: int, names: tuple[str, ...], **given: Any) -> None:
        super().__init__()
        assert given["fuse_wgrad_accumulation"] and given["delay_wgrad_compute"] and not given["bias"]
        self.in_features, self.out_features, self.names = in_features, out_features, names
        for name in names:  # a module that is given weights needs none of its own
            self.register_parameter(name, None)
        self.save_original_input = False
        self.wgrad_store = _Store()
        self._fp8_workspaces: dict[str, _Codes] = {}

    def run(self, x: Tensor, first: bool | None, counts: tuple[int, ...]) -> Tensor:
        square, grad = _recipes[-1].w_block_scaling_dim == 2, torch.is_grad_enabled()
        weights = [getattr(self, name) for name in self.names]
        operands = []
        for name, weight in zip(self.names, weights, strict=True):
            codes = self._fp8_workspaces.get(name) if first is False else None
            if codes is None or (grad and not codes.columns):
                codes = _Codes.of(weight.detach(), True, grad, square)
            if first is not None:
                self._fp8_workspaces[name] = codes
            operands.append(codes)
        call = _Call(self, counts, self.save_original_input or not grad, square)
        result: Tensor = _Layer.apply(x, call, operands, *weights)
        return result

    def backward_dw(self) -> None:
        self.wgrad_store.pop()


class Linear(_Module):
    """`te.Linear`."""

    def __init__(self, in_features: int, out_features: int, **given: Any) -> None:
        super().__init__(in_features, out_features, ("weight",), **given)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return self.run(inp, is_first_microbatch, (inp.shape[0],))


class GroupedLinear(_Module):
    """`te.GroupedLinear`, whose experts are computed one by one."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **given: Any) -> None:
        super().__init__(in_features, out_features, tuple(f"weight{i}" for i in range(num_gemms)), **given)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        return self.run(inp, is_first_microbatch, tuple(m_splits))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, statistics = _attention(query, key, value)
        ctx.save_for_backward(query, key, value, out, statistics)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _attention_backward(grads[0].contiguous(), *ctx.saved_tensors)


class DotProductAttention(nn.Module):
    """`te.DotProductAttention` of queries, keys and values `[B, S, A, …]`; the result is `[B, S, A V]`."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = _Attention.apply(query, key, value)
        return result.flatten(2)


class FusedAdam:
    """`te.optimizers.FusedAdam`: one kernel per master weight."""

    def __init__(self, params: list[nn.Parameter], **given: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params, "step": 0, **given}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in params}

    def initialize_state(self, param: nn.Parameter, store_param_remainders: bool) -> None:
        """Do nothing: the caller puts its own tensors into the state."""

    def step(self) -> None:
        for parameter, state in self.state.items():
            _adam(parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


@dataclass
class Float8BlockScaling:
    """The recipe of fine-grained FP8."""

    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1


_recipes: list[Any] = []


class _Autocast(nullcontext[None]):
    def __init__(self, enabled: bool = True, recipe: Any = None) -> None:
        super().__init__()
        self.recipe = recipe

    def __enter__(self) -> None:
        _recipes.append(self.recipe)

    def __exit__(self, *_: object) -> None:
        _recipes.pop()


def library() -> Library:
    """The stand-in in the form that `fp8.te.library.load` returns, on a Hopper GPU."""

    def module(name: str, **members: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(members)
        return made

    pytorch = module(
        "transformer_engine.pytorch",
        autocast=_Autocast,
        Linear=Linear,
        GroupedLinear=GroupedLinear,
        DotProductAttention=DotProductAttention,
        optimizers=module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam),
    )
    recipe = module(
        "transformer_engine.common.recipe", Format=Format, QParams=QParams, Float8BlockScaling=Float8BlockScaling
    )
    return Library(pytorch, recipe, CHECKED, (9, 0))
