"""The machine: versions, the GPU, its settings, and the speeds of copying and of multiplying."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time

import torch

from counterflow.launcher.gpu_settings import describe_gpu_settings
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup

PACKAGES = ("torch", "triton", "numpy", "pydantic", "transformer_engine", "deep_ep", "nvidia-nccl-cu13")
QUERIES = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu", "memory.total")


def run(setup: Setup, report: Report) -> None:
    for name in PACKAGES:
        try:
            report.number(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            report.number(name, "not installed")
    report.number("Python", platform.python_version())
    report.number("CPU cores", os.cpu_count())
    with setup.alone():
        report.number("variables of CUDA, NCCL and the allocator", describe_gpu_settings(os.environ))
        if not setup.rehearse:
            _gpu(report)
        _speeds(setup, report)


def _gpu(report: Report) -> None:
    properties = torch.cuda.get_device_properties(0)
    capability = torch.cuda.get_device_capability()
    report.number("GPU", properties.name)
    report.number("compute capability", f"{capability[0]}.{capability[1]}")
    report.number("multiprocessors", properties.multi_processor_count)
    report.number("memory, GiB", properties.total_memory / 2**30)
    report.number("CUDA of torch", torch.version.cuda)
    report.number("cuDNN", torch.backends.cudnn.version())
    report.number("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    free, total = torch.cuda.mem_get_info()
    report.number("memory that CUDA and others hold before tensors, GiB", (total - free) / 2**30)
    report.check("compute capability 9.0 or above", capability >= (9, 0), capability)
    _queues(report)
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        for name, value in zip(QUERIES, found.stdout.strip().split(", "), strict=False):
            report.number(f"nvidia-smi {name}", value)


def _queues(report: Report) -> None:
    """Pairs of streams of which one stands still while the other waits: they share a queue of the hardware.

    NCCL's communicators take their streams in turn from torch's 32 of high priority. While a stream waits for an event,
    a kernel on each of the others is to run.
    """
    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream(priority=-1) for _ in range(32))]
    beside, x = torch.cuda.Stream(), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    shared, unclear = [], 0
    for held, stream in enumerate(streams):
        with torch.cuda.stream(beside):
            torch.cuda._sleep(80_000_000)  # about 40 ms
            opens = torch.cuda.Event()
            opens.record()
        stream.wait_event(opens)
        with torch.cuda.stream(stream):
            x.clone()
        ended = {number: _kernel_on(other, x) for number, other in enumerate(streams) if number != held}
        time.sleep(0.01)
        late = [number for number, event in ended.items() if not event.query()]
        unclear += opens.query()
        shared += [(held, number) for number in late]
        torch.cuda.synchronize()
    report.number("CUDA_DEVICE_MAX_CONNECTIONS", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set"))
    report.number("streams of NCCL (1 to 32) and the computing one (0) that hold each other up", shared[:64])
    near = [pair for pair in shared if max(pair) <= 16]
    report.check("no two of the first 16 streams share a queue of the hardware", not near and not unclear, near[:16])


def _kernel_on(stream: torch.cuda.Stream, x: torch.Tensor) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        x.clone()
        event = torch.cuda.Event()
        event.record()
    return event


def _speeds(setup: Setup, report: Report) -> None:
    size = setup.pick(2**30, 2**16)
    source = torch.empty(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    report.number("copy, GB/s read and written", 2 * size / setup.milliseconds(lambda: target.copy_(source)) / 1e6)
    for dtype, side in ((torch.bfloat16, setup.pick(8192, 64)), (torch.float32, setup.pick(4096, 64))):
        a, b = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
        ms = setup.milliseconds(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
        report.number(f"{side} cubed product in {dtype}, TFLOP/s", 2 * side**3 / ms / 1e9)
