"""Operations that route rows: their kernels under Triton's interpreter against their formulas, and compiled."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.comm.permute import Choice, order_by_expert
from counterflow.kernels.routes import index, rows
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.kernels import route_cases
from counterflow.tests.kernels.route_cases import arrival, bounds, choices, in_messages, values

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Function that runs an operation's kernel by its name, in a process where Triton interprets kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_interpreter) as pool:
        yield lambda name, *arguments: pool.submit(route_cases.interpreted, name, *arguments).result(timeout=100)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@needs_triton
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_order_of_slots(run: Callable[..., Any], top_k: int) -> None:
    for tokens in (0, 1, 1030):
        ids = choices(tokens, 12, top_k, tokens)
        (found, numbers), (row, expected) = run("order_slots", ids, 12, 4), index.order_slots(ids, 12, 4)
        assert torch.equal(found, row)
        known = [*range(12), 24]
        assert torch.equal(numbers[known], expected[known]) and int(numbers[24]) == int((ids < 0).sum())


@needs_triton
def test_counts_and_copies(run: Callable[..., Any]) -> None:
    ends = bounds(3, 4, 4, 11, 12)
    ranges = torch.stack((ends[:-1], ends[1:]), 1).contiguous()
    starts, targets = torch.tensor([0, 2, 3, 3, 5, 6], dtype=torch.int32), torch.tensor([4, 1, 0, 3, 5, 2]).int()
    for tokens in (0, 1, 1030):
        ids = choices(tokens, 12, 5, tokens)
        assert_same(
            run("count_tokens", ids, ranges, starts, targets, 6), index.count_tokens(ids, ranges, starts, targets, 6)
        )
        copies = index.number_copies(ids, ends)
        assert_same(run("number_copies", ids, ends), copies)
        for typed in (torch.int16, torch.int32):
            assert_same(run("number_copies", in_messages(ids, torch.rand(ids.shape), typed)[0], ends), copies)


@needs_triton
@pytest.mark.parametrize("unit", [1, 16])
def test_rows_of_the_experts(run: Callable[..., Any], unit: int) -> None:
    for seed, (sources, local, top_k) in enumerate(((1, 3, 2), (5, 1, 4), (7, 3, 8))):
        for moved in (True, False):
            case = arrival(seed, sources, local, top_k, unit, moved)
            assert_same(run("expand_tokens", *case), index.expand_tokens(*case))
        sizes = case[2].contiguous()
        arguments = sizes, unit, int(sizes.sum()), case[-1]
        assert_same(run("sort_blocks", *arguments), index.sort_blocks(*arguments))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_moves(run: Callable[..., Any], dtype: torch.dtype) -> None:
    for tokens, width in ((1, 1), (9, 40), (6, 1500)):
        ids = choices(tokens, 12, 3, width)
        positions = index.number_copies(ids, bounds(3, 5, 12))
        count = int((positions >= 0).sum())
        x = (
            values(tokens, width, torch.float32).to(dtype)
            if dtype != torch.uint8
            else values(tokens, width, torch.float32).abs().to(dtype)
        )
        spread = rows.spread_rows(x, positions, count)
        assert_same(run("spread_rows", x, positions, count), spread)
        wide = torch.cat((spread, spread), 1)[:, :width]
        source = torch.cat((torch.randperm(count), torch.tensor([-1, -1]))).to(torch.int32)
        assert_same(run("gather_rows", wide, source), rows.gather_rows(wide, source))
        weights = torch.rand(ids.shape)
        for typed in (torch.int16, torch.int32):
            arguments = x, weights, ids, positions, count, typed
            found, expected = run("spread_messages", *arguments), rows.spread_messages(*arguments)
            end, start, _, ids_end = rows.message_ends(x.shape[1] * x.element_size(), 3, typed)
            assert found.shape == expected.shape and found.shape[1] % rows.ALIGNMENT == 0
            assert torch.equal(found[:, :end], expected[:, :end])
            assert torch.equal(found[:, start:ids_end], expected[:, start:ids_end])
        slots, _ = index.order_slots(ids, 12, 1)
        number = int((slots >= 0).sum())
        assert_same(run("put_numbers", weights, slots, number), rows.put_numbers(weights, slots, number))
        back = rows.put_numbers(weights, slots, number)
        assert_same(run("pick_numbers", back, slots), rows.pick_numbers(back, slots))
        assert torch.equal(rows.pick_numbers(back, slots), weights.masked_fill(ids < 0, 0))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 3, 8])
def test_sums(run: Callable[..., Any], dtype: torch.dtype, copies: int) -> None:
    for tokens, width in ((1, 1), (9, 40), (5, 1500)):
        slots, _ = index.order_slots(choices(tokens, 12, copies, width), 12, 1)
        x = values(int((slots >= 0).sum()) + 1, width, dtype, tokens)
        x[-1] = torch.nan  # a row of no sum
        assert_same(run("sum_copies", x, slots), rows.sum_copies(x, slots))


@needs_triton
def test_a_tokens_sum_is_choices_sum(run: Callable[..., Any]) -> None:
    order = order_by_expert(torch.rand(24, 6, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :3], 6)
    x = values(72, 1100, torch.bfloat16, 2)
    assert torch.equal(run("sum_copies", x, order.row_of_slot), Choice.every(order.row_of_slot).sum(x))


@pytest.fixture(scope="module", params=[90, pytest.param(100, marks=pytest.mark.long)], ids=["hopper", "blackwell"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[triton_worker.Compiled]:
    cache = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_compiler, initargs=(cache,)) as pool:
        waiting = [pool.submit(route_cases.compiled, case, request.param) for case in route_cases.CASES]
        return [program for future in waiting for program in future.result()]


@needs_triton
def test_compiled_kernels_spill_nothing_and_move_16_bytes_at_a_time(programs: list[triton_worker.Compiled]) -> None:
    print(f"\n{'case':24} {'target':8} warps registers spilled shared bytes")
    for p in programs:
        print(f"{p.case:24} {p.target:8} {p.warps:5} {p.registers:9} {p.spilled_bytes:7} {p.shared_bytes:12}")
    assert [p.case for p in programs if p.spilled_bytes or p.stack_bytes] == []
    assert [p.case for p in programs if p.registers * 32 * p.warps > 32_768] == [], "two programs fit"
    for p in programs:
        if p.case.startswith(("spread", "gather", "sum_copies")) and "FP32" not in p.case:
            for way in ("ld", "st"):
                assert f"{way}.global.v4.b32" in p.ptx or f"{way}.global.v2.b32" in p.ptx, f"{p.case}: {way}"
