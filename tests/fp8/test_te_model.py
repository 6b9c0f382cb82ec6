"""Transformer Engine outside linear layers: attention, the update, and hooks on its saved tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from counterflow.fp8.te.backend import TransformerEngine
from counterflow.model.core_attention import causal_attention
from counterflow.model.kernels import AssembleFunction
from counterflow.model.recompute import Rebuild
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.optimizer.adamw import Update, adamw
from counterflow.parallel.optimizer.fused_adamw import FusedAdamW
from counterflow.tests.fp8 import fake_te


def test_attention_scales_once_and_keeps_our_layout() -> None:
    """Queries are already scaled; by default the library would also divide by the root of their width."""
    attend = TransformerEngine(fake_te.library(), {}).attention(heads=3, qk_width=24, v_width=16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 20, 24), (2, 3, 20, 24), (2, 3, 20, 16)]
    results = []
    for function in (causal_attention, attend):
        parts = [torch.randn(shape, generator=generator.manual_seed(1)).requires_grad_() for shape in shapes]
        y = function(*parts)
        y.backward(torch.ones_like(y))
        results.append([y, *(part.grad for part in parts)])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and torch.equal(found, expected)


def test_off_the_cpu_attention_gets_positions_before_heads_in_memory() -> None:
    """GPU kernels read this layout; `meta` stands for a GPU here."""
    sizes = {"query": (2, 20, 3, 24), "key_value": (2, 20, 3, 32), "rotary_key": (2, 20, 8)}
    parts = [torch.empty(size, device="meta", dtype=torch.bfloat16) for size in sizes.values()]
    rotary = torch.empty(20, 4, dtype=torch.complex64, device="meta")
    for made, width in zip(AssembleFunction.apply(*parts, rotary, 0.2), (24, 24, 16), strict=True):
        assert made.shape == (2, 3, 20, width)
        assert made.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=str)
def test_fused_adam_works_on_our_own_tensors(moments: torch.dtype) -> None:
    config, generator = OptimConfig(clip_norm=1.0), torch.Generator().manual_seed(0)
    ours = [torch.randn(40, generator=generator), torch.zeros(40, dtype=moments), torch.zeros(40, dtype=moments)]
    theirs = [tensor.clone() for tensor in ours]
    fused = FusedAdamW(fake_te.library())
    for step, clip in ((1, 1.0), (2, 0.5), (3, 1.0)):
        gradient = torch.randn(40, generator=generator)
        now = Update(lr=1e-2 / step, step=step, gradient_scale=clip)
        adamw(ours[0], gradient, ours[1], ours[2], config, 0.1, now)
        fused(theirs[0], gradient, theirs[1], theirs[2], config, 0.1, now)
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), step


def test_fused_adam_goes_on_from_a_step_and_moments_that_were_loaded() -> None:
    """Bias correction follows our count of steps, not the library's own, as after loading a checkpoint."""
    config, generator = OptimConfig(), torch.Generator().manual_seed(0)
    ours = [torch.rand(8, generator=generator) for _ in range(3)]
    theirs = [tensor.clone() for tensor in ours]
    fused = FusedAdamW(fake_te.library())
    gradient = torch.ones(8)
    adamw(ours[0], gradient, ours[1], ours[2], config, 0.0, Update(1e-2, 1000))
    fused(theirs[0], gradient, theirs[1], theirs[2], config, 0.0, Update(1e-2, 1000))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    (state,) = (adam.state for _, adam in fused._of.values())
    (moments,) = state.values()
    assert moments["exp_avg"] is theirs[1] and moments["exp_avg_sq"] is theirs[2]


class _SavesWrapped(torch.autograd.Function):
    """A tensor without memory of its own around two that have some, as the library saves its quantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wrapped: Tensor) -> Tensor:
        ctx.save_for_backward(wrapped, x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        wrapped, x = ctx.saved_tensors
        assert isinstance(wrapped, TwoTensor) and x.shape == grads[0].shape
        return grads[0] * wrapped.a, None


def test_recomputation_takes_tensors_that_only_wrap_others() -> None:
    saved = Rebuild()
    x, wrapped = torch.ones(4, requires_grad=True), TwoTensor(torch.full((4,), 3.0), torch.zeros(4))
    made = x * 1
    saved.rebuild((made,), lambda: (x * 1,))
    with saved.hooks():
        y = _SavesWrapped.apply(made, wrapped)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((4,), 3.0))
