"""Peaks from data sheets and from a real matmul, and memory as the system reports it."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from counterflow.report.hardware import GIB, lookup_peak, measure_peak, memory_gib, peak_tflops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [  # names that drivers report, dense BF16 peaks from the makers' data sheets
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
    ],
)
def test_known_gpus_have_their_data_sheet_peak(name: str, tflops: float) -> None:
    peak = lookup_peak(name)
    assert peak is not None
    assert peak.tflops == tflops
    assert "data sheet" in peak.source


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A10G", "NVIDIA L40", "NVIDIA RTX A1000", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B300"],
)
def test_unknown_gpus_are_not_mistaken_for_known_ones(name: str) -> None:
    assert lookup_peak(name) is None


@pytest.mark.parametrize(("dtype", "listed"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_the_table_is_used_for_the_formats_it_lists(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, listed: bool
) -> None:
    import counterflow.report.hardware as hardware

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H800")
    monkeypatch.setattr(hardware, "measure_peak", lambda device, dtype: hardware.Peak(1.0, "measured"))
    assert peak_tflops(torch.device("cuda", 0), dtype).tflops == (989.0 if listed else 1.0)


def test_measured_peak_agrees_with_numpy_timing_the_same_product() -> None:
    size = 512
    left, right = np.random.rand(2, size, size).astype(np.float32)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    by_numpy = 2 * size**3 / min(seconds) / 1e12
    peak = measure_peak(CPU, torch.float32, size=size, seconds=0.1)
    assert 0.05 < peak.tflops / by_numpy < 20  # libraries and thread counts differ: the order of magnitude alone
    assert peak.source == "measured with a 512-cubed float32 matmul"


def test_cpu_peak_is_measured_in_about_a_second() -> None:
    start = time.process_time()
    peak = peak_tflops(CPU, torch.float32)
    spent = (time.process_time() - start) / torch.get_num_threads()
    assert peak.tflops > 0
    assert "2048-cubed float32" in peak.source
    assert spent < 4.0  # a second, with room for a slow machine: at least one warm-up and one timed product


def test_peak_memory_keeps_what_current_memory_no_longer_holds() -> None:
    before = memory_gib(CPU)
    # From the system and not by malloc, which may have as much free memory that is resident already.
    with mmap.mmap(-1, GIB // 4) as block:
        for page in range(0, GIB // 4, mmap.PAGESIZE):
            block[page] = 1  # a page is resident once it is written to
        during = memory_gib(CPU)
    after = memory_gib(CPU)
    assert during.current - before.current == pytest.approx(0.25, abs=0.05)
    assert during.peak >= during.current - 0.01
    assert after.current < during.current - 0.2
    assert after.peak >= during.peak - 0.01  # the kernel's counters lag by a few pages
    assert after.peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, rel=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak carries over on Linux only")
def test_peak_memory_of_a_child_does_not_carry_over_from_its_parent() -> None:
    block = np.ones(GIB // 8)  # 1 GiB, more than a child needs for importing torch
    program = (
        "import torch; from counterflow.report.hardware import memory_gib; print(memory_gib(torch.device('cpu')).peak)"
    )
    child = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert memory_gib(CPU).peak > block.nbytes / GIB
    assert 0.05 < float(child.stdout) < 0.9
