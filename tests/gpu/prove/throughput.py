"""Speed of training: a slice of V3's layers at full width, and the share of the GPU's peak."""

from __future__ import annotations

import time

import torch

from counterflow.model.counts import flops_per_token
from counterflow.report.hardware import peak_tflops
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, trainer

BYTES_A_LAYER = 10 * 2**30
"""Memory of a layer's weights, gradients, moments and activations, about."""


def run(setup: Setup, report: Report) -> None:
    layers = 8
    if not setup.rehearse:
        free, _ = torch.cuda.mem_get_info()
        layers = max(1, min(8, int(free * 0.95) // BYTES_A_LAYER))
    report.number("layers", setup.pick(layers, 2))
    for name, more in {
        "BF16, recompute v3": ("precision.recipe=bf16", "memory.recompute=v3"),
        "BF16, recompute full": ("precision.recipe=bf16", "memory.recompute=full"),
        "BF16, recompute v3, compiled": ("precision.recipe=bf16", "memory.recompute=v3", "run.compile=true"),
    }.items():
        if setup.rehearse and "compile" in more[-1]:
            continue
        with setup.alone(), report.attempt(name):
            _train(setup, report, name, setup.pick(layers, 2), more)
        if not setup.rehearse:
            torch.cuda.empty_cache()


def _train(setup: Setup, report: Report, name: str, layers: int, more: tuple[str, ...]) -> None:
    sequences, length = setup.pick(8, 2), setup.pick(4096, 16)
    config = setup.wide(
        layers,
        "optim.moments=bf16",
        f"batch.sequence_length={length}",
        f"batch.global_sequences={sequences}",
        *more,
    )
    of = trainer(config, setup.device)
    losses = [of.step().loss]
    seconds = []
    for _ in range(setup.pick(3, 1)):
        setup.synchronize()
        start = time.perf_counter()
        losses.append(of.step().loss)
        setup.synchronize()
        seconds.append(time.perf_counter() - start)
    of.close()
    tokens, best = sequences * length, min(seconds)
    peak = peak_tflops(setup.device, torch.bfloat16)
    report.row(
        "training",
        config=name,
        tokens_per_second=tokens / best,
        MFU=tokens / best * flops_per_token(config.model, length) / peak.tflops / 1e12,
        peak_TFLOPS=peak.tflops,
        memory_GiB=0.0 if setup.rehearse else torch.cuda.max_memory_allocated() / 2**30,
        seconds=seconds,
    )
    report.check(f"{name}: losses are finite", all(loss == loss and abs(loss) < 1e4 for loss in losses), losses)
