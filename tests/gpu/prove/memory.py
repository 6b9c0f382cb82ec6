"""Memory of a step: the dry run against the allocator, by recompute policy and recipe."""

from __future__ import annotations

import importlib.util

import torch

from counterflow.configs.config import Config
from counterflow.dryrun.rank import dry_run
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, trainer

GIB = 2**30
BOUND = 0.02


def run(setup: Setup, report: Report) -> None:
    length = setup.pick(4096, 16)
    library = importlib.util.find_spec("transformer_engine") is not None
    for recipe in ("bf16", "fp8") if library else ("bf16",):
        for recompute in ("none", "v3", "full"):
            name = f"{recipe}, recompute {recompute}"
            config = setup.wide(
                setup.pick(3, 2),
                f"precision.recipe={recipe}",
                f"memory.recompute={recompute}",
                "optim.moments=bf16",
                f"batch.sequence_length={length}",
                "batch.global_sequences=3",
            )
            with report.attempt(name):
                _step(setup, report, name, config)


def _step(setup: Setup, report: Report, name: str, config: Config) -> None:
    dry = dry_run(config, world=1, rank=0, layer=False)
    if setup.rehearse:
        report.row("peak of tensors, GiB", config=name, dry_run=dry.peak_bytes / GIB, at=dry.peak_label)
        report.check(f"{name}: there is a peak", dry.peak_bytes > dry.built_bytes > 0)
        return
    with setup.alone():
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        of = trainer(config, setup.device)
        built = torch.cuda.memory_allocated() - start
        of.step()
        torch.cuda.reset_peak_memory_stats()
        of.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - start
        reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        of.close()
    off = dry.peak_bytes / peak - 1
    report.row(
        "peak of tensors, GiB",
        config=name,
        dry_run=dry.peak_bytes / GIB,
        allocated=peak / GIB,
        off=off,
        reserved=reserved / GIB,
        outside_the_allocator=(total - free - torch.cuda.memory_reserved()) / GIB,
        built_dry=dry.built_bytes / GIB,
        built=built / GIB,
        at=dry.peak_label,
    )
    report.check(f"{name}: the dry run's peak is the allocator's", abs(off) < BOUND, off)
