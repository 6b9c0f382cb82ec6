"""The fused Triton kernels, compiled ahead of time for Hopper and Blackwell: their machine code and its registers."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from counterflow.fp8 import triton as fused
from counterflow.fp8.quantize import quantize
from counterflow.settings import UsageError
from counterflow.tests.fp8 import triton_worker
from counterflow.tests.fp8.triton_worker import CASES, Compiled

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module", params=[90, pytest.param(100, marks=pytest.mark.long)], ids=["hopper", "blackwell"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Every case for compute capability 9.0 or 10.0."""
    cache = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=triton_worker.prepare_compiler, initargs=(cache,)) as pool:
        assert not pool.submit(triton_worker.importing_ours_imported_triton).result()
        waiting = [pool.submit(triton_worker.compiled, case, request.param) for case in CASES]
        found = [program for future in waiting for program in future.result()]
    assert {program.target for program in found} == {f"sm_{request.param}a"}
    return found


@needs_triton
def test_no_kernel_spills(programs: list[Compiled]) -> None:
    print(f"\n{'case':44} {'kernel':19} {'target':8} warps registers spilled shared bytes")
    for p in programs:
        needs = f"{p.warps:5} {p.registers:9} {p.spilled_bytes:7} {p.shared_bytes:12}"
        print(f"{p.case:44} {p.kernel:19} {p.target:8} {needs}")
    assert [(p.case, p.target) for p in programs if p.spilled_bytes or p.stack_bytes] == []
    # A multiprocessor has 65,536 registers: at least 512 threads run at once.
    assert [p.case for p in programs if p.registers > 128] == []


@needs_triton
def test_codes_are_rounded_by_the_gpus_saturating_conversion(programs: list[Compiled]) -> None:
    for p in programs:
        other = p.kernel in ("combine", "combine_backward", "pack_rows", "dequantize_rows", "swiglu_backward")
        other = other or p.case.startswith("SwiGLU, cached")
        assert ("cvt.rn.satfinite.e4m3x2.f32" in p.ptx) == (not other), p.case


@needs_triton
def test_scales_are_neither_approximated_nor_flushed(programs: list[Compiled]) -> None:
    for p in programs:
        for instruction in (".ftz", "div.approx", "fma.rn.f32"):
            assert instruction not in p.ptx, (p.case, instruction)
        # Powers of two need no division, others the correctly rounded one; sigmoid may have a faster one.
        assert ("div.rn.f32" in p.ptx) == ("FP32 scales" in p.case), p.case
        assert "div.full" not in p.ptx or p.kernel.startswith("swiglu"), p.case


@needs_triton
def test_nothing_propagates_nan(programs: list[Compiled]) -> None:
    """A maximum that propagates NaN, with transposed stores of codes, trips ptxas 12.8 and 12.9; see `numerics`."""
    for p in programs:
        assert "max.NaN" not in p.ptx and "min.NaN" not in p.ptx, p.case


@needs_triton
def test_rows_and_columns_move_16_bytes_at_a_time(programs: list[Compiled]) -> None:
    """Loads and stores are wide where 16 divides the sizes; 8 bytes of codes for 8 numbers of BF16."""
    for p in programs:
        if "uneven" not in p.case and "odd groups" not in p.case:
            assert "ld.global.v4.b32" in p.ptx, p.case
            assert "st.global.v4.b32" in p.ptx or "st.global.v2.b32" in p.ptx, p.case
            assert "global.b8" not in p.ptx and "global.b16" not in p.ptx, p.case


# Wrong arguments, found before Triton is imported


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_wrong_arguments_are_refused_with_numbers() -> None:
    cached, slots = quantize(bf16(4, 256)), torch.zeros(4, 2, dtype=torch.int64)
    groups = fused.group_rows((2, 3), "cpu")
    faults = [
        (lambda: fused.swiglu(bf16(4, 7)), "7 columns, which is odd"),
        (lambda: fused.swiglu(bf16(4, 8).float()), r"gate_up is torch.float32 \[4, 8\], but torch.bfloat16"),
        (lambda: fused.swiglu(bf16(8, 4).t()), r"strides \(1, 4\): call contiguous\(\)"),
        (lambda: fused.swiglu(bf16(4, 8), torch.zeros(3)), r"weights is torch.float32 \[3\], .* \[4\]"),
        (lambda: fused.swiglu(quantize(bf16(4, 8), (128, 1))), r"tiles of \(128, 1\)"),
        (lambda: fused.swiglu_quantize_columns(bf16(4, 8), groups=groups), r"\(2, 3\) do not divide .* 4 rows"),
        (lambda: fused.swiglu_backward(bf16(4, 8), bf16(4, 8)), r"grad is .* \[4, 8\], .* \[4, 4\]"),
        (lambda: fused.quantize_both(bf16(4)), r"\[4\], but torch.bfloat16 \[any, any\]"),
        (lambda: fused.requantize_columns(quantize(bf16(4, 8), fmt="e5m2")), "has e5m2"),
        (lambda: fused.requantize_columns(cached, groups), "do not divide a matrix of 4 rows"),
        (lambda: fused.quantize_for_dispatch(bf16(5, 8), slots, 8), r"row_of_slot is .* \[4, 2\], .* \[5, any\]"),
        (lambda: fused.quantize_for_dispatch(bf16(4, 8), slots.float(), 8), "row_of_slot is torch.float32"),
        (lambda: fused.group_rows((3, 2), "cpu"), r"group ends \(3, 2\) fall"),
        (lambda: fused.unpack_message(bf16(2, 8).view(torch.uint8), 8), r"uint8 \[any, 32\], not .* \[2, 16\]"),
        (lambda: fused.quantize_for_dispatch(bf16(4, 8), slots.to("meta"), 8), "x on cpu, row_of_slot on meta"),
    ]  # fmt: skip
    for call, message in faults:
        with pytest.raises(UsageError, match=message):
            call()


@needs_triton
def test_tensors_on_a_cpu_are_sent_to_quantize() -> None:
    with pytest.raises(UsageError, match=r"its tensors are on cpu: there, .* such as counterflow\.fp8\.quantize"):
        fused.quantize_both(bf16(4, 8))


def test_without_triton_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("counterflow.fp8.triton") and "kernels" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "counterflow.fp8.triton.numerics", raising=False)
    with pytest.raises(UsageError, match=r"pip install triton"):
        fused.quantize_both(bf16(4, 8))


def test_empty_matrices_need_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    rows, columns = fused.quantize_both(bf16(0, 8), fused.group_rows((0, 0), "cpu"))
    assert rows.shape == columns.shape == (0, 8) and columns.ends == (0, 0) and columns.scale.shape == (0, 8)
    hidden, kept = fused.swiglu_keeping(bf16(0, 256))
    assert hidden.shape == (0, 128) and kept.shape == (0, 256)
