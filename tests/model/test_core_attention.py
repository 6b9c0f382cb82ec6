"""Causal attention against torch's, and against a softmax over whole score matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.model.core_attention import BLOCK, causal_attention
from counterflow.tests.model.small import relative_error

Parts = list[Tensor]

# batch, heads, length, query width, value width
SHAPES = [
    (2, 3, 1, 8, 8),
    (1, 2, 7, 12, 5),
    (2, 3, BLOCK - 1, 24, 16),
    (1, 4, BLOCK, 16, 24),
    (2, 2, BLOCK + 1, 20, 12),
    (1, 3, 2 * BLOCK + 45, 24, 16),
    (1, 1, 4 * BLOCK, 8, 40),
]


def random_parts(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> Parts:
    """Query (already scaled), key, value and the gradient of the result."""
    batch, heads, length, width, value_width = shape
    generator = torch.Generator().manual_seed(length)
    parts = [
        torch.randn(batch, heads, length, size, generator=generator)
        for size in (width, width, value_width, value_width)
    ]
    parts[0] *= 2 * width**-0.5
    return [part.to(dtype) for part in parts]


def with_gradients(attend, parts: Parts) -> Parts:
    """Result and gradients of query, key and value."""
    query, key, value = (part.detach().clone().requires_grad_() for part in parts[:3])
    result = attend(query, key, value)
    result.backward(parts[3])
    return [result.detach(), query.grad, key.grad, value.grad]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (query @ key.transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_equal_sdpa_and_the_formula(shape: tuple[int, int, int, int, int]) -> None:
    parts = random_parts(shape)
    found = with_gradients(causal_attention, parts)
    # References in FP64, whose own rounding differs from CPU to CPU and is far below the bound.
    for reference in (sdpa, written_out):
        for actual, expected in zip(found, with_gradients(reference, [part.double() for part in parts]), strict=True):
            assert actual.shape == expected.shape
            # The query's gradient at length 1 is zero: softmax of one score is constant.
            assert (actual - expected).norm() <= 1e-5 * max(expected.norm().item(), 1e-2)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_bf16_is_within_a_percent_of_the_exact_result(shape: tuple[int, int, int, int, int]) -> None:
    parts = random_parts(shape, torch.bfloat16)
    exact = with_gradients(written_out, [part.double() for part in parts])
    for actual, expected in zip(with_gradients(causal_attention, parts), exact, strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) < 0.01


def test_large_scores_do_not_overflow() -> None:
    parts = random_parts((1, 2, BLOCK + 3, 8, 8))
    parts[0] *= 1e4
    found = with_gradients(causal_attention, parts)
    assert all(part.isfinite().all() for part in found)
    # Scores so far apart choose one key each.
    best = (parts[0] @ parts[1].transpose(2, 3)).masked_fill(torch.ones(131, 131).triu(1).bool(), -torch.inf).argmax(-1)
    assert torch.allclose(found[0], parts[2].gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 8)), atol=1e-4)


def test_inputs_need_not_be_contiguous() -> None:
    shape = (2, 3, BLOCK + 5, 12, 8)
    parts = random_parts(shape)
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    assert not strided[0].is_contiguous()
    found, expected = (with_gradients(causal_attention, given) for given in (strided, parts))
    assert all(map(torch.equal, found, expected))


def test_nothing_quadratic_in_the_length_is_saved() -> None:
    saved = []
    query, key, value = (part.requires_grad_() for part in random_parts((1, 2, 4 * BLOCK, 8, 8))[:3])

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal_attention(query, key, value)
    assert saved and sum(saved) <= 4 * query.numel() + 2 * 4 * BLOCK  # including a statistic for each row
