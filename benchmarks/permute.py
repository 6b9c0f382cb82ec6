"""Comparison of tokens moved to expert order and back on one rank: ours, and plain index_select and index_add.

    python -P benchmarks/permute.py [--threads 2] [--rounds 30]

Forward and backward run in BF16 without experts in between, gate weights included. "bf16 adds" lets index_add round
after every addition, "fp32 adds" sums in FP32 and rounds once, as ours does. All sides run in turn in one process. A
line shows the medians of all sides, and the median and quartiles of the rounds' ratios to ours.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.comm.flat import FlatDispatcher

Side = Callable[..., tuple[Tensor, Tensor]]
SHAPES = ((2048, 512, 4, 16), (8192, 1024, 8, 64))  # tokens, hidden, top-k, experts


def ours(x: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    dispatcher = FlatDispatcher(None, num_experts)
    dispatched = dispatcher.dispatch(x, expert_ids, weights)
    return dispatcher.combine(dispatched.x, dispatched), dispatched.weights


def plain(x: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    torch.bincount(flat, minlength=num_experts).cumsum(0)
    token = order // expert_ids.shape[1]
    rows = x.index_select(0, token)
    return torch.zeros_like(x).index_add(0, token, rows), weights.flatten().index_select(0, order)


def plain_fp32(x: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    torch.bincount(flat, minlength=num_experts).cumsum(0)
    token = order // expert_ids.shape[1]
    rows = x.float().index_select(0, token).to(x.dtype)  # so that the backward adds in FP32 too
    total = torch.zeros(x.shape).index_add(0, token, rows.float()).to(x.dtype)
    return total, weights.flatten().index_select(0, order)


def measure(side: Side, inputs: tuple[Tensor, Tensor, Tensor, int]) -> float:
    """Seconds of one forward and backward."""
    x, _, weights, _ = inputs
    x.grad = weights.grad = None
    start = time.perf_counter()
    combined, row_weights = side(*inputs)
    torch.autograd.backward((combined, row_weights), (x.detach(), row_weights.detach()))
    return time.perf_counter() - start


def keep_freed_memory() -> None:
    """Stop glibc from returning memory: page faults of new memory, equal on all sides, would hide the difference."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    print(
        "tokens hidden top-k experts    ours ms   bf16 adds ms  / ours [quartiles]   fp32 adds ms  / ours [quartiles]"
    )
    for tokens, hidden, top_k, experts in SHAPES:
        x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
        expert_ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        weights = torch.rand(tokens, top_k, generator=generator).requires_grad_()
        times: dict[Side, list[float]] = {ours: [], plain: [], plain_fp32: []}
        for round_number in range(options.rounds + 3):  # the first three warm up
            for side in (list(times), list(times)[::-1])[round_number % 2]:
                times[side].append(measure(side, (x, expert_ids, weights, experts)))
        print(
            f"{tokens:6} {hidden:6} {top_k:5} {experts:7} {1e3 * statistics.median(times[ours][3:]):10.2f}"
            f"{compare(times[plain][3:], times[ours][3:])}{compare(times[plain_fp32][3:], times[ours][3:])}"
        )


def compare(other: list[float], own: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(other, own, strict=True)], n=4)
    return f"   {1e3 * statistics.median(other):12.2f}   {middle:4.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
