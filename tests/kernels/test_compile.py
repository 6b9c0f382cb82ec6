"""The fused kernels, compiled ahead of time for Hopper and Blackwell: their machine code and its registers."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from counterflow.kernels.examples import EXAMPLES, MODULES, OF_LIBRARIES
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.fp8.triton_worker import Compiled
from counterflow.tests.kernels import worker

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

NARROW = ("sum_rows", "gate", "balance")
"""Kernels that move a percent of the bytes and less, and may do so in narrow pieces."""


@pytest.fixture(scope="module", params=[90, pytest.param(100, marks=pytest.mark.long)], ids=["hopper", "blackwell"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every example for compute capability 9.0 or 10.0."""
    cache = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_compiler, initargs=(cache,)) as pool:
        ours = [index for index, example in enumerate(EXAMPLES) if example.operation not in OF_LIBRARIES]
        waiting = [pool.submit(worker.compiled, index, request.param) for index in ours]
        made = [future.result() for future in waiting]
    assert all(len(launched) == 1 for launched in made), "an operation is one launch"
    found = [program for launched in made for program in launched]
    assert {program.target for program in found} == {f"sm_{request.param}a"}
    return found


@needs_triton
def test_no_kernel_spills(programs: list[Compiled]) -> None:
    for p in programs:
        print(
            f"{p.case:60} {p.kernel:19} {p.target:8} {p.warps:5} {p.registers:9} {p.spilled_bytes:7} {p.shared_bytes}"
        )
    assert [(p.case, p.target) for p in programs if p.spilled_bytes or p.stack_bytes] == []
    # A multiprocessor has 65,536 registers: at least 512 threads run at once.
    assert [p.case for p in programs if p.registers > 128] == []


@needs_triton
def test_rows_move_16_bytes_at_a_time(programs: list[Compiled]) -> None:
    for p in programs:
        if not p.kernel.startswith(NARROW):
            assert "ld.global.v4.b32" in p.ptx and "st.global.v4.b32" in p.ptx, p.case
            assert "global.b8" not in p.ptx, p.case


@needs_triton
def test_values_are_neither_flushed_nor_contracted(programs: list[Compiled]) -> None:
    for p in programs:
        assert "fma.rn.f32" not in p.ptx, p.case
        # The reciprocal root of a mean that has an epsilon: it is never subnormal.
        assert p.ptx.count(".ftz") == p.ptx.count("rsqrt.approx.ftz.f32"), p.case


def test_every_operation_has_an_example() -> None:
    modules = {module.__name__ for module in MODULES}
    ours = {name for name, made in OPERATIONS.items() if made.gpu.__module__ in modules}
    assert {example.operation for example in EXAMPLES} == ours


def test_an_example_states_the_bytes_of_each_tensor_once() -> None:
    bytes_of = {(example.operation, example.case): example.bytes() for example in EXAMPLES}
    token = 4096 * 2
    assert bytes_of["add_rms_norm", "hidden"] == 4 * 7168 * token + 7168 * 2
    assert bytes_of["swiglu", "shared expert"] == 3 * 2048 * token
    # Query and key 192 wide, keys and values 256, value 128, for 128 heads; two rotary keys and the factors.
    assert bytes_of["assemble", "attention"] == (3 * 192 + 256 + 128) * 128 * token + 64 * token + 32 * 8 * 4096
