"""Fused kernels for quantising, transposing and permuting: as costly in an FP8 step on a GPU as its grouped products.

Plain functions of CUDA tensors, in Triton, for compute capability 9.0 and above. Importing this package imports no
Triton. Results are those of `fp8/quantize.py`, `model/kernels.py` and `comm/permute.py` to the last bit, except for
SwiGLU's exp (see `swiglu_kernels`) and the sign of a NaN, which is lost.
Shapes: T tokens, K choices per token, H hidden, R rows, I inner width of a feed-forward; C(n) = ceil(n / 128).

| function | reads | writes |
| --- | --- | --- |
| `swiglu_keeping` | gate and up | silu(gate) up weight, and gate and up in E4M3 in tiles of (1, 128) |
| `swiglu` | gate and up, BF16 or E4M3 | silu(gate) up weight |
| `swiglu_quantize_columns` | the same | the same values in tiles of (128, 1), transposed: recomputed for W |
| `swiglu_backward` | gradient, gate and up, BF16 or E4M3 | gradients of gate and up, and the weights' |
| `quantize_rows` | BF16 or FP32 | E4M3 or E5M6 in tiles of (1, 128) |
| `dequantize_rows` | E4M3 or E5M6 in tiles of (1, 128) | BF16 or FP32 |
| `quantize_both` | BF16 | both tilings |
| `requantize_columns` | E4M3 in tiles of (1, 128) | tiles of (128, 1), transposed (V3 §3.5.2) |
| `quantize_for_dispatch` | tokens | each token's codes and scales in its rows of one buffer |

"Transposed": the codes of a matrix `[M, N]` lie in memory as `[N, M]`, the layout for products that contract its rows.
They are returned as a BlockQuantized of shape `[M, N]` whose `data` is a view; `data.mT` is contiguous. Tiles of 128
rows begin again with each of `groups` (`group_rows`).
"""

from ..message import message_bytes, unpack_message
from .launch import RowGroups, group_rows
from .ops import (
    quantize_both,
    quantize_for_dispatch,
    requantize_columns,
    swiglu,
    swiglu_backward,
    swiglu_keeping,
    swiglu_quantize_columns,
)
from .rows import dequantize_rows, packs, quantize_rows

__all__ = [
    "RowGroups",
    "dequantize_rows",
    "group_rows",
    "message_bytes",
    "packs",
    "quantize_both",
    "quantize_for_dispatch",
    "quantize_rows",
    "requantize_columns",
    "swiglu",
    "swiglu_backward",
    "swiglu_keeping",
    "swiglu_quantize_columns",
    "unpack_message",
]
