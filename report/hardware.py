"""Peak matmul speed of the device, and memory that the process uses."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

GIB = 2**30

DENSE_BF16_TFLOPS = (
    # Pattern in torch.cuda.get_device_name(), peak, source. The first match counts, so variants stand before the plain
    # name. Data sheets print figures "with sparsity": a dense figure is half of them.
    ("GB200", 2500.0, "NVIDIA GB200 NVL72 data sheet"),
    ("B200", 2250.0, "NVIDIA HGX B200 data sheet"),
    ("H100 NVL|H200 NVL", 835.0, "NVIDIA H100 and H200 data sheets"),
    ("H[18]00 PCIe", 756.0, "NVIDIA H100 data sheet"),
    ("GH200|H[12]00|H800", 989.0, "NVIDIA H100 and H200 data sheets"),
    ("H20", 148.0, "NVIDIA H20 data sheet"),
    ("A[18]00", 312.0, "NVIDIA A100 data sheet"),
    ("L40S", 362.0, "NVIDIA L40S data sheet"),
    ("L4", 121.0, "NVIDIA L4 data sheet"),
    ("A10", 125.0, "NVIDIA A10 data sheet"),
)


class Peak(NamedTuple):
    """Matmul speed that MFU is a share of, and the source of the figure."""

    tflops: float
    source: str


class MemoryUse(NamedTuple):
    """Memory of this process in GiB."""

    current: float
    peak: float


def peak_tflops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Dense matmul peak of `device` in TFLOP/s: from data sheets for a known GPU in BF16 or FP16, else measured.

    Ranks that share a machine's cores should call this at the same time, as they also compute at the same time. Each
    then measures its share of the machine and not the whole.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        listed = lookup_peak(torch.cuda.get_device_name(device))
        if listed is not None:
            return listed
    return measure_peak(device, dtype)


def lookup_peak(device_name: str) -> Peak | None:
    """Dense BF16 peak of a GPU by the name that its driver reports; None for an unlisted GPU or a MIG slice."""
    if "MIG" in device_name.split():
        return None
    for pattern, tflops, source in DENSE_BF16_TFLOPS:
        if re.search(rf"\b(?:{pattern})\b", device_name):
            return Peak(tflops, source)
    return None


def measure_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.6) -> Peak:
    """Time a `size`-cubed matmul on the current number of threads: the median of as many as fit in `seconds`.

    The default size is 2048 on a CPU. A GPU finishes this product too fast to be timed, so its default is 8192.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    out = torch.empty(size, size, dtype=dtype, device=device)

    def multiply() -> float:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronize(device)
        return time.perf_counter() - start

    spent = multiply()  # the first product includes page faults, kernel selection and the start of threads
    timed = [multiply()]
    while spent + sum(timed) < seconds and len(timed) < 25:
        timed.append(multiply())
    tflops = 2.0 * size**3 / statistics.median(timed) / 1e12
    return Peak(tflops, f"measured with a {size}-cubed {str(dtype).removeprefix('torch.')} matmul")


def memory_gib(device: torch.device) -> MemoryUse:
    """Memory of this process, current and peak: tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device) / GIB, torch.cuda.max_memory_allocated(device) / GIB)
    current = psutil.Process().memory_info().rss
    return MemoryUse(current / GIB, max(current, _peak_resident_bytes()) / GIB)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its peak includes the parent process's, which Linux keeps across fork and exec.
        high_water = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if high_water:
            return int(high_water[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
