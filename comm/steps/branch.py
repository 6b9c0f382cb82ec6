"""Choice between fused kernels and torch's operations."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def takes_fused_kernels(tensor: Tensor) -> bool:
    """Whether rows with this tensor's device are moved by fused kernels: on GPUs with Triton, and in dry runs."""
    return tensor.device.type == "meta" or (tensor.device.type == "cuda" and _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
