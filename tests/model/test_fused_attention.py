"""The Function around torch's fused attention: gradients from the result or from its codes, and what it holds.

The CPU's flash attention of torch stands for the kernels of GPUs: its backward, too, takes the forward's result.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from counterflow.fp8.emulated import keep as quantise
from counterflow.fp8.kept import Kept
from counterflow.fp8.recipe import Recipe
from counterflow.fp8.tensor_formats import TensorFormat
from counterflow.model.core_attention import attend
from counterflow.model.fused_attention import (
    CUDNN,
    EFFICIENT,
    FLASH,
    Forwarded,
    FusedKernel,
    choose_kernel,
    fused_attention,
)

aten = torch.ops.aten
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 37, 32
CODES = Recipe({"attention_out.cache": TensorFormat("e5m6")}).linear("attention_out")


def cpu_forward(query: Tensor, key: Tensor, value: Tensor, grad: bool) -> Forwarded:
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=1.0)
    return Forwarded(out, (logsumexp, None), (LENGTH,))


def cpu_backward(grad, query, key, value, out, saved, lengths):
    (logsumexp, nothing), (length,) = saved, lengths
    assert nothing is None and length == LENGTH
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsumexp, 0.0, True, scale=1.0
    )


CPU = FusedKernel("cpu", cpu_forward, cpu_backward)


def operands(device: str = "cpu", dtype: torch.dtype = torch.float32, value_width: int = WIDTH) -> list[Tensor]:
    """Query, key and value as `[B, A, S, …]` that lie in memory as `[B, S, A, …]`, and a gradient of the result."""
    generator = torch.Generator().manual_seed(5)
    sizes = WIDTH, WIDTH, value_width
    parts = [torch.randn(BATCH, LENGTH, HEADS, size, generator=generator).transpose(1, 2) for size in sizes]
    parts = [part.to(device, dtype).requires_grad_() for part in parts]
    return [*parts, torch.randn(BATCH, LENGTH, HEADS * value_width, generator=generator).to(device, dtype)]


def written_out(parts: list[Tensor], restored: Tensor | None) -> list[Tensor]:
    """Result and gradients by the formula in FP64; the backward reads `restored` in place of the result."""
    query, key, value, grad = (part.detach().double() for part in parts)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    p = (query @ key.mT).masked_fill(future, float("-inf")).softmax(-1)
    result = p @ value
    grad = grad.unflatten(2, (HEADS, -1)).transpose(1, 2)
    out = result if restored is None else restored.double().unflatten(2, (HEADS, -1)).transpose(1, 2)
    grad_scores = p * (grad @ value.mT - (grad * out).sum(-1, keepdim=True))
    return [result.transpose(1, 2).flatten(2), grad_scores @ key, grad_scores.mT @ query, p.mT @ grad]


def largest_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("cached", [False, True])
def test_the_backward_reads_what_was_kept_of_the_result(cached: bool) -> None:
    parts = operands()
    attended, kept = fused_attention(CPU, *parts[:3], (lambda x: quantise(CODES, x)) if cached else lambda x: None)
    assert (kept is not None) == cached
    attended.backward(parts[3])
    found = [attended.detach(), *(part.grad for part in parts[:3])]
    restored = kept.restore(*kept.tensors) if kept is not None else None
    errors = largest_errors(found, written_out(parts, restored))
    assert max(errors) < 1e-5
    if cached:  # the codes are coarse enough to be told from the result itself
        errors = largest_errors(found, written_out(parts, None))
        assert errors[0] < 1e-5 and errors[1] > 1e-4


def held(parts: list[Tensor], keep) -> tuple[Tensor, list[StorageWeakRef]]:
    """Output of a stand-in for the output projection, and the memory of attention's result."""
    results: list[StorageWeakRef] = []

    def keep_and_watch(x: Tensor) -> Kept | None:
        results.append(StorageWeakRef(x.untyped_storage()))
        return keep(x)

    attended, kept = attend(*parts[:3], keep_and_watch)
    return attended.sum() if kept is None else attended * 1.0, results


@pytest.mark.parametrize("cached", [False, True])
def test_the_result_is_held_only_where_nothing_else_is_kept(cached: bool) -> None:
    """On the meta device, which runs the calls of a GPU."""
    parts = operands("meta", torch.bfloat16, 16)
    codes = torch.empty(8, device="meta", dtype=torch.uint8)
    width = HEADS * 16

    def keep(_: Tensor) -> Kept | None:
        return Kept((codes,), lambda codes: codes.new_empty(BATCH, LENGTH, width, dtype=torch.bfloat16))

    graph, (result,) = held(parts, keep if cached else lambda _: None)
    assert result.expired() == cached
    graph.sum().backward()
    assert all(part.grad is not None and part.grad.shape == part.shape for part in parts[:3])


def test_nothing_is_kept_without_a_backward() -> None:
    parts = operands("meta", torch.bfloat16, 16)
    with torch.no_grad():
        attended, kept = attend(*parts[:3], lambda x: pytest.fail("kept"))
    assert kept is None and attended.shape == (BATCH, LENGTH, HEADS * 16)


@pytest.mark.parametrize("kernel", [CUDNN, FLASH, EFFICIENT], ids=lambda kernel: kernel.name)
def test_each_call_fits_the_operations_of_this_torch(kernel: FusedKernel) -> None:
    parts = operands("meta", torch.bfloat16, WIDTH if kernel is FLASH else 16)
    attended, _ = fused_attention(kernel, *parts[:3], lambda x: None)
    attended.backward(parts[3])
    assert all(part.grad is not None and part.grad.shape == part.shape for part in parts[:3])


def test_planned_gpus_run_cudnn_in_half_precision() -> None:
    assert choose_kernel(*operands("meta", torch.bfloat16, 16)[:3]) is CUDNN
    assert choose_kernel(*operands("meta", torch.float32, 16)[:3]) is EFFICIENT
