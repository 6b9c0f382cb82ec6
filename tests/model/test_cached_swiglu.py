"""SwiGLU with an FP8 cache by fused kernels, against the separate operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.fp8.emulated import keep, one_kernel_cache
from counterflow.fp8.recipe import Monitor, Recipe
from counterflow.fp8.tensor_formats import v3_formats
from counterflow.model.cached_swiglu import cached_swiglu
from counterflow.model.kernels import Kernels, SwiGLUFunction, swiglu


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scales", ["pow2", "v3"])
def test_outputs_gradients_and_what_w_sees_are_those_of_separate_operations(weighted: bool, scales: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up0 = torch.randn(6, 8, 512, generator=generator).bfloat16()
    grad = torch.randn(6, 8, 256, generator=generator).bfloat16()
    weights0 = torch.rand(48, generator=generator) if weighted else None
    recipe, kernels = Recipe(v3_formats(scales)).linear("experts_down"), Kernels.make()  # type: ignore[arg-type]
    assert recipe.cache is not None
    results: list[list[Tensor]] = []
    for fused in (False, True):
        gate_up = gate_up0.clone().requires_grad_()
        weights = None if weights0 is None else weights0.clone().requires_grad_()
        if fused:
            hidden, kept = cached_swiglu(gate_up, weights, recipe.cache)
        else:
            cache = keep(recipe, gate_up)
            assert cache is not None
            hidden = SwiGLUFunction.apply(gate_up, weights, kernels, cache)
            more = () if weights is None else (weights.detach(),)
            kept = cache.and_then(more, lambda gate_up, weights=None: swiglu(gate_up, weights, kernels))
        hidden.backward(grad)
        assert gate_up.grad is not None
        results.append([hidden.detach(), kept.restore(*kept.tensors), gate_up.grad])
        if weights is not None:
            assert weights.grad is not None
            results[-1].append(weights.grad)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_one_kernel_makes_the_cache_where_it_can() -> None:
    recipe = Recipe(v3_formats()).linear("shared_down")
    x = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    assert one_kernel_cache(recipe, x) is recipe.cache
    assert one_kernel_cache(recipe, torch.ones(4, 256).bfloat16()) is None  # a CPU has cheaper ways
    assert one_kernel_cache(recipe, x.float()) is None
    assert one_kernel_cache(Recipe(v3_formats()).linear("shared_up"), x) is None
    with torch.no_grad():
        assert one_kernel_cache(recipe, x) is None and keep(recipe, x) is None
    watched = Recipe(v3_formats(), monitor=Monitor(observer=lambda *_: None)).linear("shared_down")
    assert one_kernel_cache(watched, x) is None
