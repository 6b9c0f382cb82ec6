"""Weight gradients of layers that are not quantised, added up in FP32 by the product itself, with NVIDIA's apex.

Without apex such a gradient is a product rounded to BF16, which the optimizer then adds to its FP32 sum. Only this
kernel of apex is used: Transformer Engine has the rest. PyPI's `apex` is another package, which breaks when it is
imported. So the search is for the compiled module, which only NVIDIA's package has.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache

from torch import Tensor

MODULE = "fused_weight_gradient_mlp_cuda"

logger = logging.getLogger(__name__)

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""`accumulate(x, dy, sum)` adds `dy^T x` to `sum` `[N, K]` FP32; x `[T, K]` and dy `[T, N]` BF16 on a GPU."""


@cache
def find_accumulate() -> Accumulate | None:
    """Return apex's kernel; None without apex."""
    if importlib.util.find_spec(MODULE) is None:
        return None
    try:
        module = importlib.import_module(MODULE)
    except Exception as error:  # built for another torch or CUDA, as a rule: ImportError, OSError or RuntimeError
        logger.warning("apex's %s is installed but cannot be imported, and is not used: %s", MODULE, error)
        return None
    found: Accumulate = module.wgrad_gemm_accum_fp32
    return found
