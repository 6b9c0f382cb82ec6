"""Choice between fused kernels and torch's operations."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def takes_fused_kernels(device: torch.device) -> bool:
    """Whether rows on this device are moved by fused kernels: on GPUs, if Triton is installed, and in dry runs."""
    return device.type != "cpu" and (device.type != "cuda" or _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
