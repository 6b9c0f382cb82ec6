"""Fake of `transformer_engine` on a CPU: its signatures, its rules and side effects, and our emulated products.

The fake has the library's behaviour (2.20.2, read in its source), above all where it is surprising:

- a call that either recorded release would not bind raises TypeError; recipes drop unknown keywords without a warning
- operands whose sizes the GPU would refuse raise ValueError
- `is_first_microbatch` None quantises the weight every time, True makes and keeps it and OVERWRITES main_grad, False
  uses the kept weight; a weight that was kept without gradients has no copy for dgrad
- with `fuse_wgrad_accumulation` autograd gets no gradient, or an uninitialised one where the weight has
  `grad_added_to_main_grad`
- with `delay_wgrad_compute` operands wait first in, first out; where none waits Linear raises, GroupedLinear does not
- x is quantised along the rows for the weight's gradient in the forward, from x itself, unless `save_original_input`

`like_emulated` does two things as in our emulation, so that results can be compared bit by bit: x is quantised along
the rows from fprop's operand, and a weight gradient is rounded to the weight's format before it is added.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import pydantic.dataclasses
import torch
from torch import Tensor, nn

from counterflow.fp8 import gemm
from counterflow.fp8.quantize import fake_quantize
from counterflow.fp8.te import library as libraries
from counterflow.fp8.te.library import Library
from counterflow.model.core_attention import causal_attention
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.optimizer.adamw import Update, adamw
from counterflow.tests.fp8.record_te_signatures import RECORD, parse

RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
CALLS: Counter[str] = Counter()
"""Number of calls of each callable."""
FIRST: list[bool | None] = []
"""`is_first_microbatch` of every forward."""
like_emulated = False
_active: list[Any] = []


def binds(name: str, skip: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function refuse the calls that one of the recorded releases would refuse.

    `skip` arguments come before the recorded ones.
    """
    signatures = [parse(release["callables"][name]) for release in RECORDED.values()]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            for signature in signatures:
                signature.bind(*args[skip:], **named)
            CALLS[name] += 1
            return function(*args, **named)

        return call

    return wrap


# transformer_engine.common.recipe


class Format(Enum):
    E4M3 = ("e4m3", "e4m3")
    E5M2 = ("e5m2", "e5m2")
    HYBRID = ("e4m3", "e5m2")


@pydantic.dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


@pydantic.dataclasses.dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@pydantic.dataclasses.dataclass
class Float8BlockScaling:
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = "dequantized"  # as with NVTE_BACKWARD_OVERRIDE in the environment
    fp8_quant_fwd_inp = QParams()  # as with NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()

    def __post_init__(self) -> None:
        dims = self.x_block_scaling_dim, self.w_block_scaling_dim, self.grad_block_scaling_dim
        assert set(dims) <= {1, 2} and dims.count(2) <= 1, "2D by 2D block gemm not supported."
        assert self.fp8_format != Format.E5M2 and not self.fp8_dpa and not self.fp8_mha


@pydantic.dataclasses.dataclass
class MXFP8BlockScaling:
    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = "dequantized"
    enable_2d_quantization: bool = False


def _values(role: str, x: Tensor, contracted: int, offsets: Tensor | None = None) -> Tensor:
    """Dequantised values of x as an operand of the active recipe."""
    recipe = _active[-1]
    assert recipe.backward_override is None
    fmt = recipe.fp8_format.value[role == "gradient"]
    if isinstance(recipe, MXFP8BlockScaling):
        return _microscaled(x, contracted, 448.0 if fmt == "e4m3" else 57344.0, fmt)
    square, scales = {
        "input": (recipe.x_block_scaling_dim, recipe.fp8_quant_fwd_inp),
        "weight": (recipe.w_block_scaling_dim, recipe.fp8_quant_fwd_weight),
        "gradient": (recipe.grad_block_scaling_dim, recipe.fp8_quant_bwd_grad),
    }[role]
    tile = (128, 128) if square == 2 else (1, 128) if contracted else (128, 1)
    return fake_quantize(x, tile, fmt, scales.power_2_scale, offsets=offsets if tile[0] > 1 else None)


def _microscaled(x: Tensor, contracted: int, largest: float, fmt: str) -> Tensor:
    """Dequantised values of x in tiles of 1 x 32 along the contraction, with power-of-two scales."""
    lines = x.mT if contracted == 0 else x
    tiles = lines.float().unflatten(-1, (-1, 32))
    amax = tiles.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax / largest))), 1.0)
    dtype = torch.float8_e4m3fn if fmt == "e4m3" else torch.float8_e5m2
    values = ((tiles / scale).to(dtype).float() * scale).flatten(-2).to(x.dtype)
    return values.mT if contracted == 0 else values


# transformer_engine.pytorch


class Autocast:
    @binds("autocast", skip=1)  # in 2.9 it is a function
    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe: Any = None, **_: Any) -> None:
        assert enabled and not calibrating and recipe is not None, "what it takes by default is no block scaling"
        self.recipe = recipe

    def __enter__(self) -> None:
        _active.append(self.recipe)

    def __exit__(self, *_: Any) -> None:
        _active.pop()


class _Call:
    """State of a product's autograd node, except for tensors."""

    def __init__(self, module: _Module, first: bool | None, counts: list[int] | None) -> None:
        self.module, self.first, self.recipe = module, first, _active[-1]
        self.keep_original = module.save_original_input
        self.offsets = None if counts is None else torch.tensor(counts).cumsum(0).int()


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, operands: tuple[Tensor, Tensor | None], *weights: Tensor) -> Tensor:
        rows = _values("input", x.detach(), 1)
        source = rows if like_emulated and not call.keep_original else x.detach()
        saved = x if call.keep_original else _values("input", source, 0, call.offsets)
        ctx.save_for_backward(saved, operands[1])
        ctx.call, ctx.weights = call, weights
        return gemm.fprop(rows, operands[0], offsets=call.offsets, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call, (saved, weight), dy = ctx.call, ctx.saved_tensors, grads[0].contiguous()
        assert weight is not None, "the kept weight has no copy for dgrad"
        _active.append(call.recipe)  # the library keeps the recipe of the forward
        dx = gemm.dgrad(_values("gradient", dy, 1), weight, offsets=call.offsets, out_dtype=dy.dtype)
        columns = _values("gradient", dy, 0, call.offsets)
        x = _values("input", saved.detach(), 0, call.offsets) if call.keep_original else saved
        _active.pop()
        module, weights = call.module, ctx.weights
        made = module.put(lambda: module.add(columns, x, call, weights))
        return dx, None, None, *(module.for_autograd(weight, made) for weight in weights)


class _Module(nn.Module):
    """State that Linear and GroupedLinear share."""

    def __init__(
        self, in_features: int, out_features: int, params_dtype: Any, device: Any, fused: bool, delayed: bool
    ) -> None:
        super().__init__()
        assert device == "meta", "a module that is given our weights needs none of its own"
        self.in_features, self.out_features, self.fused, self.delayed = in_features, out_features, fused, delayed
        self.empty = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        self.save_original_input = False
        self._fp8_workspaces: dict[str, Any] = {}
        self.store: deque[Callable[[], None]] = deque()
        unit = 32 if isinstance(_library.capability, tuple) and _library.capability >= (10, 0) else 16
        self.unit = unit

    def run(self, x: Tensor, first: bool | None, counts: list[int] | None, weights: list[nn.Parameter]) -> Tensor:
        assert _active, "nothing is quantised outside autocast"
        FIRST.append(first)
        for size in (*(counts or [x.shape[0]]), self.in_features, self.out_features):
            if size % self.unit:
                raise ValueError(f"FP8 execution requires multiples of {self.unit}, got {size}")
        if x.dtype != weights[0].dtype:
            raise TypeError("Data types for parameters must match when outside of autocasted region")
        assert x.dim() == 2 and x.is_contiguous()
        stack = weights[0] if counts is None else torch.stack([weight.detach() for weight in weights])
        operands = self._quantised(stack.detach(), first)
        call = _Call(self, first, counts)
        if torch.is_grad_enabled():
            return _Products.apply(x, call, operands, *weights)
        return gemm.fprop(_values("input", x, 1), operands[0], offsets=call.offsets, out_dtype=x.dtype)

    def _quantised(self, weight: Tensor, first: bool | None) -> tuple[Tensor, Tensor | None]:
        """Quantised weight for fprop and, where there will be a backward, for dgrad."""
        if first is False and "weight" in self._fp8_workspaces:
            return self._fp8_workspaces["weight"]
        CALLS["weight quantised"] += 1
        backward = _values("weight", weight, 0) if torch.is_grad_enabled() else None
        made = _values("weight", weight, 1), backward
        if first is not None:
            self._fp8_workspaces["weight"] = made
        return made

    def put(self, work: Callable[[], Any]) -> Any:
        if self.delayed:
            self.store.append(work)
            return None
        return work()

    def add(self, dy: Tensor, x: Tensor, call: _Call, weights: tuple[nn.Parameter, ...]) -> list[Tensor]:
        dtype = weights[0].dtype if like_emulated else torch.float32
        made = gemm.wgrad(dy, x, offsets=call.offsets, out_dtype=dtype)
        parts = [made] if call.offsets is None else list(made)
        for weight, part in zip(weights, parts, strict=True):
            if not self.fused:
                weight.grad = part.to(weight.dtype)  # assigned, not added
            elif call.first is True:
                weight.main_grad.copy_(part)
            else:
                weight.main_grad.add_(part)
        return parts

    def for_autograd(self, weight: nn.Parameter, made: Any) -> Tensor | None:
        if not self.fused:
            return None
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            return torch.full_like(weight, float("nan"))
        return None


class Linear(_Module):
    @binds("Linear.__init__")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: Any = None,
        device: Any = "cuda",
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype, device, fuse_wgrad_accumulation, delay_wgrad_compute)
        assert not bias
        self.weight = nn.Parameter(self.empty)

    @binds("Linear.forward")
    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return self.run(inp, is_first_microbatch, None, [self.weight])

    @binds("TransformerEngineBaseModule.backward_dw")
    def backward_dw(self) -> None:
        if not self.store:
            raise RuntimeError("Pop empty queue. No distributed environment detected.")
        self.store.popleft()()


class GroupedLinear(_Module):
    @binds("GroupedLinear.__init__")
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: Any = None,
        device: Any = "cuda",
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype, device, fuse_wgrad_accumulation, delay_wgrad_compute)
        assert not bias
        self.num_gemms = num_gemms
        self.use_grouped_tensor = True  # as with NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM=1
        for index in range(num_gemms):
            setattr(self, f"weight{index}", nn.Parameter(self.empty.clone()))

    @binds("GroupedLinear.forward")
    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert not self.use_grouped_tensor, "the native grouped_tensor path requires CUDA m_splits"
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return self.run(inp, is_first_microbatch, m_splits, weights)

    @binds("GroupedLinear.backward_dw")
    def backward_dw(self) -> None:
        if self.store:
            self.store.popleft()()


class DotProductAttention(nn.Module):
    @binds("DotProductAttention.__init__")
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: tuple[int, int],
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
        softmax_scale: float,
    ) -> None:
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "bshd", "causal")
        self.heads, self.widths, self.scale = num_attention_heads, kv_channels, softmax_scale

    @binds("DotProductAttention.forward")
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert query.shape[2:] == key.shape[2:] == (self.heads, self.widths[0])
        assert value.shape[2:] == (self.heads, self.widths[1])
        parts = [part.transpose(1, 2).contiguous() for part in (query * self.scale, key, value)]
        return causal_attention(*parts).transpose(1, 2).flatten(2)


class FusedAdam(torch.optim.Optimizer):
    @binds("FusedAdam.__init__")
    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **named: Any) -> None:
        assert named["adam_w_mode"] and named["bias_correction"] and not named["master_weights"]
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": named["exp_avg_dtype"], "exp_avg_sq": named["exp_avg_sq_dtype"]}
        self.scales: dict[nn.Parameter, set[str]] = {}

    @binds("FusedAdam.initialize_state")
    def initialize_state(self, param: nn.Parameter, store_param_remainders: bool) -> None:
        for name, dtype in self.dtypes.items():
            self.state[param][name] = torch.zeros_like(param, dtype=dtype)
            if dtype != torch.float32:
                self.scales.setdefault(param, set()).add(name)

    @binds("FusedAdam.step")
    def step(self) -> None:
        (group,) = self.param_groups
        group["step"] = group.get("step", 0) + 1
        (param,) = group["params"]
        state, (beta1, beta2) = self.state[param], group["betas"]
        for name, dtype in self.dtypes.items():
            assert state[name].dtype == dtype and (dtype == torch.float32 or name in self.scales[param])
        config = OptimConfig(beta1=beta1, beta2=beta2, eps=group["eps"])
        now = Update(group["lr"], group["step"])
        adamw(param.data, param.grad, state["exp_avg"], state["exp_avg_sq"], config, group["weight_decay"], now)


def _available(name: str) -> Callable[..., Any]:
    @binds(name)
    def available(return_reason: bool = False) -> Any:
        microscaling = _library.capability >= (10, 0)
        right = microscaling == (name == "is_mxfp8_available")
        return (right, "" if right else "Device compute capability is not right.") if return_reason else right

    return available


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def library(capability: tuple[int, int] = (9, 0), version: str = libraries.CHECKED) -> Library:
    """The fake in the form that `load` returns."""
    global _library
    _library = Library(
        _module(
            "transformer_engine.pytorch",
            autocast=Autocast,
            Linear=Linear,
            GroupedLinear=GroupedLinear,
            DotProductAttention=DotProductAttention,
            optimizers=_module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam),
            is_fp8_block_scaling_available=_available("is_fp8_block_scaling_available"),
            is_mxfp8_available=_available("is_mxfp8_available"),
        ),
        _module(
            "transformer_engine.common.recipe",
            Format=Format,
            QParams=QParams,
            Float8BlockScaling=Float8BlockScaling,
            MXFP8BlockScaling=MXFP8BlockScaling,
        ),
        version,
        capability,
    )
    return _library


_library = library()


@contextlib.contextmanager
def installed(emulated: bool = False, capability: tuple[int, int] = (9, 0)) -> Iterator[Library]:
    """Context in which a run finds the fake on any device. `emulated` sets `like_emulated`."""
    global like_emulated
    real, before, found = libraries.load, like_emulated, library(capability)
    libraries.load, like_emulated = (lambda device: found), emulated
    CALLS.clear()
    FIRST.clear()
    try:
        yield found
    finally:
        libraries.load, like_emulated = real, before
