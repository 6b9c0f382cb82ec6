"""Import of Triton, which is optional: the modules of kernels import it, and are imported when a kernel is called."""

from __future__ import annotations

import importlib
from typing import Any

from ...settings import UsageError


def load_triton() -> tuple[Any, Any]:
    """The modules `triton` and `triton.language`. Raises UsageError where Triton is not installed."""
    try:
        return importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError as error:
        raise UsageError(
            f"the fused FP8 kernels are written in Triton, which cannot be imported ({error}): install it with "
            "pip install 'triton>=3.7' (Linux only; PyTorch for CUDA brings it along), or compute without them"
        ) from error
