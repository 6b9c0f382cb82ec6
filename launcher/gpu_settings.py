"""Settings of CUDA, NCCL and torch for training on GPUs, made before any of them starts.

A variable that the user has set stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..settings import UsageError

TRACE_LENGTH = 2000
"""Collectives that each rank keeps a record of, for the dump after a timeout."""

_OLD_NAMES = {
    "PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Names that torch still reads, so that a user's old setting counts too."""


def gpu_variables(environ: Mapping[str, str], dumps: Path | None = None, deterministic: bool = False) -> dict[str, str]:
    """Variables to add to `environ` before CUDA and NCCL start, without those that the user has set.

    Args:
        dumps: path, without the rank's number, of the records that a collective's timeout leaves.
        deterministic: whether cuBLAS sums in one order, and Transformer Engine's attention too (`run.deterministic`).
    """
    wanted = {
        # With the 8 queues of the default, streams would share one: a receive that waits for a pipeline rank would hold
        # up the exchange that the other rank needs first (dryrun/rehearsal.py).
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        # The rows of the experts differ in each micro-batch, and blocks of fixed sizes would not fit the next ones.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(TRACE_LENGTH),
        # Pipeline ranks send one tensor at a time, over groups of two that nothing else uses: nothing is serialised.
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
    }
    if dumps is not None:
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = str(dumps)
    if deterministic:
        wanted |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    return {
        name: value
        for name, value in wanted.items()
        if name not in environ and _OLD_NAMES.get(name, name) not in environ
    }


def refuse_launch_order(environ: Mapping[str, str], pp: int) -> None:
    """Raise UsageError where NCCL would start the kernels of a pipeline in the order of the host's calls.

    A receive is posted behind one that has not arrived. In that order it would hold up everything launched after it,
    also what has to run before the first can arrive: a rehearsal of most schedules ends in a circle of waits.
    """
    if pp > 1 and environ.get("NCCL_LAUNCH_ORDER_IMPLICIT", "0") not in ("", "0"):
        raise UsageError(
            f"NCCL_LAUNCH_ORDER_IMPLICIT is set, and with parallel.pp {pp} ranks would wait for each other for ever: "
            "unset it. The caps of comm.max_ctas leave room for all communicators of a rank at once instead"
        )


def describe_gpu_settings(environ: Mapping[str, str]) -> str:
    """All variables of CUDA, NCCL and torch's allocator that are set, for the log."""
    prefixes = (
        "NCCL_",
        "TORCH_NCCL_",
        "TORCH_FR_",
        "CUDA_DEVICE_MAX",
        "CUBLAS_WORKSPACE",
        "PYTORCH_ALLOC",
        "PYTORCH_CUDA",
    )
    return ", ".join(f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith(prefixes))


def set_product_precision() -> str:
    """Let cuBLAS sum in FP32 throughout; returns the settings in words.

    By default cuBLAS may round the partial sums of a split contraction to BF16. TF32 would round the router's FP32
    operands to 10 bits.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "ieee"
    else:
        matmul.allow_tf32 = False
    return "products on the GPU: partial sums in FP32, no TF32"


def make_deterministic() -> None:
    """Take kernels whose results are the same in every run; torch raises an error where it has none."""
    torch.use_deterministic_algorithms(True)
    # Memory that nothing reads before it is written needs no filling.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
