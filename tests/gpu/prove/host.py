"""Work of the host for layers of V3's width, beside the GPU's time: milliseconds, launches, the dearest kernels."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from counterflow.configs.config import Config
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, batches, forward_backward, trainer

LAYERS = 4


def run(setup: Setup, report: Report) -> None:
    length = setup.pick(4096, 16)
    common = (
        f"batch.sequence_length={length}",
        "batch.global_sequences=4",
        "memory.recompute=v3",
        "optim.moments=bf16",
    )
    recipes = {"BF16": ("precision.recipe=bf16",), "BF16, compiled": ("precision.recipe=bf16", "run.compile=true")}
    if not setup.rehearse:
        recipes["FP8"] = ("precision.recipe=fp8",)
    for name, more in recipes.items():
        if setup.rehearse and "compile" in more[-1]:
            continue  # a compiler of C++ may be missing here
        with setup.alone(), report.attempt(name):
            _layers(setup, report, name, setup.wide(LAYERS, *common, *more))


def _layers(setup: Setup, report: Report, name: str, config: Config) -> None:
    of, given = trainer(config, setup.device), batches(config, 4)

    def run() -> Any:
        return forward_backward(of, given)

    run()
    run()
    host, device = [], []
    for _ in range(setup.pick(5, 1)):
        setup.synchronize()
        start = time.perf_counter()
        run()
        host.append(time.perf_counter() - start)
        setup.synchronize()
        device.append(time.perf_counter() - start)
    pairs = len(given) * LAYERS
    with profile(activities=[ProfilerActivity.CPU, *([] if setup.rehearse else [ProfilerActivity.CUDA])]) as profiled:
        run()
        setup.synchronize()
    events = profiled.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu = sum(_device_time(e) for e in kernels) / 1e3
    report.row(
        "a MoE layer and micro-batch: forward, backward and W",
        recipe=name,
        host_ms=statistics.median(host) * 1e3 / pairs,
        whole_ms=statistics.median(device) * 1e3 / pairs,
        GPU_busy_ms=on_gpu / pairs,
        kernels=sum(e.count for e in kernels) / pairs,
        launches=sum(e.count for e in events if "LaunchKernel" in e.key) / pairs,
        host_waits=sum(e.count for e in events if "Synchronize" in e.key or e.key == "aten::_local_scalar_dense")
        / pairs,
    )
    report.check(f"{name}: the host keeps ahead of the GPU", setup.rehearse or sum(host) < 0.95 * sum(device), host)
    for event in sorted(kernels, key=_device_time, reverse=True)[:12]:
        report.row(
            f"dearest kernels, {name}",
            kernel=event.key[:90],
            ms_a_layer=_device_time(event) / 1e3 / pairs,
            calls_a_layer=event.count / pairs,
        )
    for event in sorted(events, key=lambda e: e.self_cpu_time_total, reverse=True)[:12]:
        report.row(
            f"dearest on the host, {name}", operation=event.key[:60], us_a_layer=event.self_cpu_time_total / pairs
        )


def _device_time(event: Any) -> float:
    """Microseconds on the GPU; the attribute has had two names."""
    found = getattr(event, "self_device_time_total", None)
    return float(event.self_cuda_time_total if found is None else found)
