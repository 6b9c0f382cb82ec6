"""Order by expert, gather-sum and block transposition against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.permute import Choice, order_by_expert, transpose_blocks


@given(tokens=st.integers(0, 40), experts=st.integers(1, 300), top_k=st.integers(1, 8), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_slots_are_sorted_by_expert_then_token(tokens: int, experts: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    order = order_by_expert(expert_ids, experts)
    flat = expert_ids.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert order.slot_of_row.tolist() == expected
    assert order.token_of_row.tolist() == [slot // top_k for slot in expected]
    assert order.rows_per_expert.tolist() == [flat.count(expert) for expert in range(experts)]
    assert order.row_of_slot.shape == expert_ids.shape
    assert [expected[row] for row in order.row_of_slot.flatten().tolist()] == list(range(len(flat)))


def test_more_experts_than_sixteen_bits_are_sorted() -> None:
    expert_ids = torch.tensor([[40_000, 1], [70_000, 39_999], [2, 40_000]])
    assert order_by_expert(expert_ids, 70_001).slot_of_row.tolist() == [1, 4, 3, 0, 5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8])
def test_a_sum_of_rows_adds_in_slot_order_in_fp32_and_rounds_once(dtype: torch.dtype, top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    for tokens, hidden in ((1, 1), (7, 5), (33, 64), (50, 200)):
        # Values of many magnitudes, so that another order or an intermediate rounding gives other bits.
        scale = torch.exp2(torch.randint(-6, 7, (tokens * top_k, hidden), generator=generator))
        rows = (torch.randn(tokens * top_k, hidden, generator=generator) * scale).to(dtype)
        index = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k)
        total = torch.zeros(tokens, hidden)
        for slot in range(top_k):
            total = total + rows[index[:, slot]].float()
        assert torch.equal(Choice.every(index).sum(rows), total.to(dtype))


def test_a_sum_of_rows_rounds_ties_to_even() -> None:
    ulp = 2.0**-7  # of BF16 between 1 and 2
    rows = torch.tensor([[1.0], [ulp / 2], [1.0 + ulp], [ulp / 2]], dtype=torch.bfloat16)
    assert Choice.every(torch.tensor([[0, 1], [2, 3]])).sum(rows).flatten().tolist() == [1.0, 1.0 + 2 * ulp]


def test_a_sum_of_rows_keeps_nan_and_infinity() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.tensor([[float("nan")], [float("inf")], [1.0]], dtype=dtype)
        summed = Choice.every(torch.tensor([[0, 2], [1, 2]])).sum(rows)
        assert summed[0].isnan() and summed[1] == float("inf")


def test_a_sum_of_rows_takes_rows_that_are_not_contiguous() -> None:
    index = torch.tensor([[0, 2], [3, 1]])
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype).t()
        assert torch.equal(Choice.every(index).sum(rows), Choice.every(index).sum(rows.contiguous()))


def test_no_tokens_sum_to_no_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert Choice.every(torch.empty(0, 2, dtype=torch.int64)).sum(torch.empty(0, 3, dtype=dtype)).shape == (0, 3)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_transposed_blocks_keep_their_inner_order(rows: int, columns: int, seed: int) -> None:
    sizes = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    blocks = [[(a, b, i) for i in range(sizes[a, b])] for a in range(rows) for b in range(columns)]
    stored = [item for block in blocks for item in block]
    index = transpose_blocks(sizes, len(stored))
    assert [stored[i] for i in index] == sorted(stored, key=lambda item: (item[1], item[0], item[2]))
    inverse = transpose_blocks(sizes.t(), len(stored))
    assert index[inverse].tolist() == list(range(len(stored)))
