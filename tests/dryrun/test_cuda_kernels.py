"""Operations of dry runs, each of which has a kernel for CUDA in the torch of the record."""

from __future__ import annotations

import pytest

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import dry_run
from counterflow.kernels.op import NAMESPACE
from counterflow.tests.gpu.record_cuda_kernels import read

RUNS = {
    "flat, FP32": (2, ("precision.recipe=fp32", "parallel.ep=2", "optim.ema_decay=0.9")),
    "two hops, BF16": (
        4,
        ("precision.recipe=bf16", "parallel.ep=4", "parallel.gpus_per_node=2", "memory.recompute=v3"),
    ),
    "pipeline, FP8": (
        8,
        (
            *("precision.recipe=fp8", "parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
            *("memory.recompute=full", "optim.reduce=bf16", "balance.device_loss=0.1", "balance.capacity_factor=2.0"),
        ),
    ),
    "dropped tokens": (1, ("precision.recipe=bf16", "balance.capacity_factor=2.0", "balance.keep_sequences=0.5")),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_operation_of_a_dry_run_has_a_kernel_for_cuda(run: str) -> None:
    world, settings = RUNS[run]
    version, recorded = read()
    assert version.startswith("torch 2.1") and "+cu" in version
    used = dry_run(load_config("tiny", settings), world, 0, microbatches=4, layer=False).operations
    assert len(used) > 40
    assert {name for name in used if not name.startswith(f"{NAMESPACE}.")} - recorded == set()


def test_the_record_tells_what_has_a_kernel_from_what_has_none() -> None:
    _, recorded = read()
    assert len(recorded) > 2000
    assert {"aten.mm.default", "aten._grouped_mm.default", "aten.add_.Tensor"} <= recorded
    assert not {"aten._sparse_mm_reduce_impl.default", "aten.mkldnn_linear.default"} & recorded
