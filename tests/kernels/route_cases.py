"""Arguments for the operations of `kernels/routes`, and functions that run their kernels in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterflow.kernels.launch import Launch
from counterflow.kernels.op import OPERATIONS
from counterflow.kernels.routes import index, rows  # noqa: F401 - their import defines the operations
from counterflow.tests.fp8.triton_worker import Compiled, compile_launch

Arguments = tuple[Any, ...]


def on_gpu(name: str) -> Callable[..., Any]:
    """The function that launches an operation's kernel."""
    return OPERATIONS[name].gpu


def interpreted(name: str, *arguments: Any) -> Any:
    """Result of the operation's kernel on CPU tensors, under Triton's interpreter."""
    return on_gpu(name)(*arguments)


def choices(tokens: int, experts: int, top_k: int, seed: int = 0, nowhere: float = 0.2) -> Tensor:
    """Experts of tokens, some of them sent nowhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < nowhere, -1)


def bounds(*ends: int) -> Tensor:
    return torch.tensor((0, *ends), dtype=torch.int32)


def in_messages(ids: Tensor, weights: Tensor, id_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same ids and weights as views into one matrix of messages."""
    tokens, top_k = ids.shape
    size = 16 * (-(-(4 + id_type.itemsize) * top_k // 16)) + 16
    messages = torch.zeros(tokens, size, dtype=torch.uint8)
    inner = messages[:, 16 : 16 + 4 * top_k].view(torch.float32)
    inner.copy_(weights)
    place = messages[:, 16 + 4 * top_k : 16 + (4 + id_type.itemsize) * top_k].view(id_type)
    place.copy_(ids)
    return place, inner


def arrival(seed: int, sources: int, local: int, top_k: int, unit: int, moved: bool = False) -> Arguments:
    """Arguments of `expand_tokens`: tokens of several sources, some of which send none, in any order of sources.

    With `moved` they arrive in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    first, experts = 2 * local, 5 * local
    order = torch.randperm(sources, generator=generator)
    numbers = [0 if n == 1 else int(torch.randint(1, 9, (), generator=generator)) for n in range(sources)]
    parts = {n: choices(numbers[n], experts, top_k, seed + n) for n in range(sources)}
    everywhere = torch.stack([torch.bincount(part[part >= 0], minlength=experts) for part in parts.values()])
    counts = everywhere[:, first : first + local]
    ids = torch.cat([parts[int(n)] for n in order.argsort()])
    weights = torch.rand(ids.shape, generator=generator)
    places = torch.randperm(len(ids), generator=generator) if moved else None
    if places is not None:
        ids = torch.empty_like(ids).index_copy_(0, places, ids)
    padded = int((-(-counts.sum(0) // unit) * unit).sum())
    received = torch.cat((counts, torch.tensor(numbers)[:, None]), 1)  # as counts arrive: strided views
    typed = in_messages(ids, weights, torch.int16)
    return (*typed, received[:, :local], received[:, local], order.to(torch.int32), places, first, unit, padded)


def values(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, so that another order or rounding of a sum gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-6, 7, (count, width), generator=generator))
    return (torch.randn(count, width, generator=generator) * scale).to(dtype)


# Compiled at V3's sizes: 64 ranks on 8 nodes, 256 experts, top 8, 4,096 tokens of 7,168.


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _messages() -> tuple[Tensor, Tensor]:
    messages = _meta(30_000, 14_384, dtype=torch.uint8)
    return messages[:, 14_368:].view(torch.int16), messages[:, 14_336:14_368].view(torch.float32)


def _spread_messages(width: int, dtype: torch.dtype) -> None:
    positions, weights = _meta(*IDS), _meta(*IDS, dtype=torch.float32)
    given = _meta(4096, width, dtype=dtype), weights, _ids(), positions, 16_384, torch.int16
    on_gpu("spread_messages")(*given)


def _expand_tokens() -> None:
    received = _meta(64, 13, dtype=torch.int64)
    on_gpu("expand_tokens")(*_messages(), received[:, :4], received[:, 4], _meta(64), None, 36, 16, 32_800)


def _gather_rows() -> None:
    on_gpu("gather_rows")(_meta(30_000, 14_384, dtype=torch.uint8)[:, :14_336].view(torch.bfloat16), _meta(32_800))


def _ids() -> Tensor:
    return _meta(*IDS, dtype=torch.int64)


IDS = (4096, 8)
CASES: dict[str, Callable[[], object]] = {
    "order_slots": lambda: on_gpu("order_slots")(_ids(), 256, 4),
    "count_tokens": lambda: on_gpu("count_tokens")(_ids(), _meta(328, 2), _meta(329), _meta(840), 1680),
    "number_copies": lambda: on_gpu("number_copies")(_ids(), _meta(9)),
    "number_copies, relay": lambda: on_gpu("number_copies")(_messages()[0], _meta(9)),
    "expand_tokens": _expand_tokens,
    "sort_blocks": lambda: on_gpu("sort_blocks")(_meta(64, 4, dtype=torch.int64), 16, 32_768, 32_800),
    "spread_rows": lambda: on_gpu("spread_rows")(_meta(4096, 7168, dtype=torch.bfloat16), _meta(*IDS), 32_768),
    "spread_rows, relay": lambda: on_gpu("spread_rows")(_meta(16_384, 14_384, dtype=torch.uint8), _meta(*IDS), 30_000),
    "spread_messages": lambda: _spread_messages(7168, torch.bfloat16),
    "spread_messages, FP8": lambda: _spread_messages(7392, torch.uint8),
    "gather_rows": _gather_rows,
    "gather_rows, FP8": lambda: on_gpu("gather_rows")(_meta(30_000, 7440, dtype=torch.uint8)[:, :7392], _meta(32_800)),
    "sum_copies": lambda: on_gpu("sum_copies")(_meta(32_768, 7168, dtype=torch.bfloat16), _meta(*IDS)),
    "sum_copies, FP32": lambda: on_gpu("sum_copies")(_meta(16_384, 8, dtype=torch.float32), _meta(*IDS)),
    "put_numbers": lambda: on_gpu("put_numbers")(_meta(*IDS, dtype=torch.float32), _meta(*IDS), 32_768),
    "pick_numbers": lambda: on_gpu("pick_numbers")(_meta(32_768, dtype=torch.float32), _meta(*IDS)),
}


def compiled(case: str, capability: int) -> list[Compiled]:
    """The kernel that a case launches, compiled for that compute capability times ten."""
    launches: list[Launch] = []
    Launch.run = lambda launch: launches.append(launch)  # type: ignore[method-assign]
    CASES[case]()
    return [compile_launch(case, launch, capability) for launch in launches]
