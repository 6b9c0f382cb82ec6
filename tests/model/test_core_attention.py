"""Attention itself against torch's and against a softmax over whole score matrices."""

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


def rounding_of_a_vanishing_gradient(parts: Parts) -> float:
    """Bound on the gradients of query and key at length 1, which are zero: softmax of one score is constant.

    The backward of softmax subtracts two equal dot products of gradient and value, each of V terms and off by at most
    V 2^-24 of the sum of their magnitudes. The difference multiplies the key or the query.
    """
    query, key, value, gradient = parts
    difference = 2 * value.shape[-1] * 2.0**-24 * (gradient * value).abs().sum(-1, keepdim=True)
    return max((difference * other).norm().item() for other in (query, key))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_equal_sdpa_and_the_formula(shape: tuple[int, int, int, int, int]) -> None:
    parts = random_parts(shape)
    ours = with_gradients(causal_attention, parts)
    vanishing = rounding_of_a_vanishing_gradient(parts) if shape[2] == 1 else 0.0
    for theirs in (with_gradients(sdpa, parts), with_gradients(written_out, [part.double() for part in parts])):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            assert (mine - other).norm() <= 1e-5 * max(other.norm().item(), 1e-2) + vanishing


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_bf16_is_within_a_percent_of_the_exact_result(shape: tuple[int, int, int, int, int]) -> None:
    parts = random_parts(shape, torch.bfloat16)
    exact = with_gradients(written_out, [part.double() for part in parts])
    for mine, truth in zip(with_gradients(causal_attention, parts), exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, truth) < 0.01


def test_large_scores_do_not_overflow() -> None:
    parts = random_parts((1, 2, BLOCK + 3, 8, 8))
    parts[0] *= 1e4
    ours = with_gradients(causal_attention, parts)
    assert all(part.isfinite().all() for part in ours)
    # Scores so far apart choose one key each.
    best = (parts[0] @ parts[1].transpose(2, 3)).masked_fill(torch.ones(131, 131).triu(1).bool(), -torch.inf).argmax(-1)
    assert torch.allclose(ours[0], parts[2].gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 8)), atol=1e-4)


def test_inputs_need_not_be_contiguous() -> None:
    shape = (2, 3, BLOCK + 5, 12, 8)
    parts = random_parts(shape)
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    assert not strided[0].is_contiguous()
    for mine, other in zip(
        with_gradients(causal_attention, strided), with_gradients(causal_attention, parts), strict=True
    ):
        assert torch.equal(mine, other)


def test_nothing_quadratic_in_the_length_is_saved() -> None:
    saved = []
    query, key, value = (part.requires_grad_() for part in random_parts((1, 2, 4 * BLOCK, 8, 8))[:3])

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal_attention(query, key, value)
    assert saved and sum(saved) <= 4 * query.numel() + 2 * 4 * BLOCK  # a statistic for each row may be among them
