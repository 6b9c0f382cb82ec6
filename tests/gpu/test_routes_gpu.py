"""Kernels that route rows, on a GPU, against their formulas on the CPU: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.kernels.op import OPERATIONS
from counterflow.kernels.routes import index, rows
from counterflow.tests.kernels.route_cases import arrival, bounds, choices, values

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of compute capability 9.0 or above",
)
TOKENS, EXPERTS, TOP_K = 4096, 256, 8


def assert_same(name: str, *arguments: Any, first: int | None = None) -> Any:
    """Compare an operation's results, the first of them only with `first`; returns those of the CPU."""
    expected = OPERATIONS[name].formula(*arguments)
    found = OPERATIONS[name].gpu(*(each.cuda() if isinstance(each, Tensor) else each for each in arguments))
    pairs = list(zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True))
    for one, other in pairs[:first]:
        assert one.dtype == other.dtype and torch.equal(one.cpu(), other), name
    return expected


def test_indices() -> None:
    ids = choices(TOKENS, EXPERTS, TOP_K)
    row_of_slot, numbers = assert_same("order_slots", ids, EXPERTS, 4, first=1)
    found = index.order_slots(ids.cuda(), EXPERTS, 4)[1].cpu()
    known = [*range(EXPERTS), 2 * EXPERTS]
    assert torch.equal(found[known], numbers[known]) and int(row_of_slot.max()) + 1 == int(numbers[:EXPERTS].sum())
    ends = bounds(*range(32, EXPERTS + 1, 32))
    assert_same("number_copies", ids, ends)
    ranges, starts = torch.stack((ends[:-1], ends[1:]), 1).contiguous(), torch.arange(9, dtype=torch.int32)
    assert_same("count_tokens", ids, ranges, starts, torch.arange(8).int().flip(0), 8)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("unit", [1, 16])
def test_rows_of_the_experts(unit: int, moved: bool) -> None:
    for seed, (sources, local, top_k) in enumerate(((1, 4, 8), (64, 4, 8), (8, 32, 6))):
        case = arrival(seed, sources, local, top_k, unit, moved)
        assert_same("expand_tokens", *case)
        sizes = case[2].contiguous()
        assert_same("sort_blocks", sizes, unit, int(sizes.sum()), case[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_moves_and_sums_at_v3s_widths(dtype: torch.dtype) -> None:
    width = 7392 if dtype == torch.uint8 else 7168
    ids, x = choices(512, EXPERTS, TOP_K), values(512, width, torch.float32).abs().to(dtype)
    weights = torch.rand(ids.shape)
    copies = index.number_copies(ids, bounds(*range(32, EXPERTS + 1, 32)))
    count = int((copies >= 0).sum())
    assert_same("spread_rows", x, copies, count)
    messages = rows.spread_messages(x.cuda(), weights.cuda(), ids.cuda(), copies.cuda(), count, torch.int16).cpu()
    expected = rows.spread_messages(x, weights, ids, copies, count, torch.int16)
    ends = rows.message_ends(x.shape[1] * x.element_size(), TOP_K, torch.int16)
    assert torch.equal(messages[:, : ends[0]], expected[:, : ends[0]])
    assert torch.equal(messages[:, ends[1] : ends[3]], expected[:, ends[1] : ends[3]])
    slots, _ = index.order_slots(ids, EXPERTS, 4)
    sent = int((slots >= 0).sum())
    spread = assert_same("spread_rows", x, slots, sent)
    if dtype != torch.uint8:
        assert_same("sum_copies", spread, slots)
    assert_same("gather_rows", messages[:, : ends[0]], (torch.randperm(count)[: count // 2] - 1).to(torch.int32))
    by_row = assert_same("put_numbers", weights, slots, sent)
    assert_same("pick_numbers", by_row, slots)
