"""Examples of every fused operation at the widths of DeepSeek-V3: to compile, to compare and to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adamw, add_product, assemble, gate, norm, swiglu
from .op import OPERATIONS

MODULES = (adamw, norm, swiglu, assemble, gate, add_product)
"""Modules whose import defines the operations."""

TOKENS, HIDDEN, HEADS, PLAIN, ROTATED, VALUE = 4096, 7168, 128, 128, 64, 128
ROWS, INNER, SHARED_ROWS, DENSE = 32768, 2048, TOKENS, 18432
SHARD = 4 * 2 * INNER * HIDDEN // 4
EPS = 1e-6

Make = Callable[..., Tensor]
"""Function that makes a tensor of given sizes, BF16 unless `dtype` says otherwise."""


OF_LIBRARIES = frozenset({"add_product"})
"""Operations that a library of NVIDIA runs, and not a kernel of this package."""


class Example(NamedTuple):
    """Arguments of an operation, made on any device."""

    operation: str
    case: str
    arguments: Callable[[Make], tuple[Any, ...]]

    def on(self, device: torch.device | str) -> tuple[Any, ...]:
        """Arguments on `device`: random numbers of ordinary size, or shapes alone on the meta device."""

        def make(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            if torch.device(device).type == "meta":
                return torch.empty(sizes, dtype=dtype, device=device)
            return torch.randn(sizes, dtype=dtype, device=device)

        return self.arguments(make)

    def bytes(self) -> int:
        """Bytes of all arguments and results, each once: what the operation has to move."""
        given = self.on("meta")
        return _bytes(given) + _bytes(OPERATIONS[self.operation].shapes(*given))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0


def _assembled(make: Make) -> tuple[Any, ...]:
    both = make(1, TOKENS, 512 + ROTATED)
    query, key_value = make(1, TOKENS, HEADS, PLAIN + ROTATED), make(1, TOKENS, HEADS, PLAIN + VALUE)
    return query, key_value, both[..., 512:], make(TOKENS, ROTATED // 2, dtype=torch.complex64), 0.1


def _grads_of_attention(make: Make) -> tuple[Any, ...]:
    widths = (PLAIN + ROTATED, PLAIN + ROTATED, VALUE)
    grads = (make(1, TOKENS, HEADS, width).transpose(1, 2) for width in widths)
    return *grads, make(TOKENS, ROTATED // 2, dtype=torch.complex64), 0.1


def _shard(make: Make, moments: torch.dtype) -> tuple[Any, ...]:
    """Weights, gradient and moments of a quarter of a rank's gate and up projections, and a step's numbers."""
    state = (make(SHARD, dtype=dtype) for dtype in (torch.float32, torch.float32, moments))
    return *state, make(SHARD, dtype=moments).abs_(), 0.9, 0.95, 1e-8, 0.7, 0.4, 0.999, 1e-3


RULES = (8, 8, 4, False, True, True, True, 2.5, 4)
"""The router of V3: top 8 of 256 experts in 4 of 8 groups."""


def _logits(make: Make) -> Tensor:
    """Logits FP32 `[1, T, 256]` with margins between a token's best experts, so that roundings change no choice."""
    noise = 0.01 * make(1, TOKENS, 256, dtype=torch.float32)
    token, best = torch.arange(TOKENS, device=noise.device), torch.arange(8, device=noise.device)
    expert = (token[:, None] + best // 2) % 8 * 32 + (5 * token[:, None] + 3 * best) % 32
    return noise.scatter_add_(2, expert[None], (0.5 * (1 + best)).expand(1, TOKENS, 8))


def _summed(make: Make) -> tuple[Any, ...]:
    def counts(*sizes: int) -> Tensor:
        return make(*sizes, dtype=torch.float32).abs().to(torch.int32)

    sums = make(1, 128, 256, dtype=torch.float32), counts(1, 128, 2, 256), counts(1, 128, 8)
    return *sums, make(1, dtype=torch.float32) > -9, TOKENS, *RULES


def _chosen(make: Make) -> tuple[Any, ...]:
    logits = _logits(make)
    loss = make(dtype=torch.float32)
    return (
        make(TOKENS, 8, dtype=torch.float32),
        [loss, None, None],
        logits,
        logits.topk(8).indices.view(-1, 8),
        make(3, 1, 256, dtype=torch.float32),
        True,
        *RULES,
    )


def _wide(make: Make, width: int | None = None) -> Tensor:
    return make(TOKENS, HIDDEN if width is None else width)


EXAMPLES = [
    Example("rms_norm", "hidden", lambda make: (_wide(make), make(HIDDEN), EPS)),
    Example("rms_norm", "latent of queries", lambda make: (_wide(make, 1536), make(1536), EPS)),
    Example("rms_norm", "latent of keys and values", lambda make: (_wide(make, 576)[:, :512], make(512), EPS)),
    Example("add_rms_norm", "hidden", lambda make: (_wide(make), _wide(make), make(HIDDEN), EPS)),
    Example(
        "rms_norm_backward",
        "hidden, three gradients and the stream's",
        lambda make: ([_wide(make) for _ in range(3)], _wide(make), _wide(make), make(HIDDEN), EPS),
    ),
    Example(
        "rms_norm_backward",
        "latent of queries",
        lambda make: ([_wide(make, 1536)], None, _wide(make, 1536), make(1536), EPS),
    ),
    Example(
        "rms_norm_backward",
        "latent of keys and values",
        lambda make: ([_wide(make, 512)], None, _wide(make, 576)[:, :512], make(512), EPS),
    ),
    Example("sum_rows", "hidden", lambda make: (make(256, HIDDEN, dtype=torch.float32), torch.bfloat16)),
    Example(
        "add_rows",
        "hidden",
        lambda make: (make(HIDDEN, dtype=torch.float32), make(256, HIDDEN, dtype=torch.float32)),
    ),
    Example("add_three", "hidden", lambda make: tuple(_wide(make) for _ in range(3))),
    Example("swiglu", "routed experts", lambda make: (make(ROWS, 2 * INNER), make(ROWS, dtype=torch.float32))),
    Example("swiglu", "shared expert", lambda make: (make(SHARED_ROWS, 2 * INNER), None)),
    Example("swiglu", "dense", lambda make: (make(SHARED_ROWS, 2 * DENSE), None)),
    Example(
        "swiglu_backward",
        "routed experts",
        lambda make: (make(ROWS, INNER), make(ROWS, 2 * INNER), make(ROWS, dtype=torch.float32)),
    ),
    Example("swiglu_backward", "shared expert", lambda make: (make(TOKENS, INNER), make(TOKENS, 2 * INNER), None)),
    Example("swiglu_backward", "dense", lambda make: (make(TOKENS, DENSE), make(TOKENS, 2 * DENSE), None)),
    Example("adamw", "moments in BF16", lambda make: _shard(make, torch.bfloat16)),
    Example("adamw", "moments in FP32", lambda make: _shard(make, torch.float32)),
    Example(
        "gate",
        "V3",
        lambda make: (_logits(make), 1e-4 * make(256, dtype=torch.float32), *RULES),
    ),
    Example("gate_balance", "V3", _summed),
    Example("gate_backward", "V3", _chosen),
    Example(
        "add_product",
        "output of attention",
        lambda make: (make(HIDDEN, HEADS * VALUE, dtype=torch.float32), _wide(make), _wide(make, HEADS * VALUE), 1.0),
    ),
    Example("assemble", "attention", _assembled),
    Example("assemble_backward", "attention", _grads_of_attention),
]
"""One or more examples of every operation that is defined here."""
