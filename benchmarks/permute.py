"""Moving tokens to expert order and back on one rank: ours beside a plain index_select and index_add.

    python -P benchmarks/permute.py [--threads 2] [--rounds 30]

Forward and backward in BF16 without experts between, gate weights included. Both sides run in turn in one process; a
line gives the medians and the median of the rounds' ratios with its quartiles. The plain version also rounds after
every addition, so it is less accurate besides.
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

SHAPES = ((2048, 512, 4, 16), (8192, 1024, 8, 64))  # tokens, hidden, top-k, experts


def ours(x: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    dispatcher = FlatDispatcher(None, num_experts)
    dispatched = dispatcher.dispatch(x, expert_ids, weights)
    return dispatcher.combine(dispatched.x, dispatched), dispatched.weights


def plain(x: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    token = order // expert_ids.shape[1]
    rows = x.index_select(0, token)
    torch.bincount(flat, minlength=num_experts).cumsum(0)
    return torch.zeros_like(x).index_add(0, token, rows), weights.flatten().index_select(0, order)


def measure(side: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, Tensor, Tensor, int]) -> float:
    """Seconds of one forward and backward."""
    x, _, weights, _ = inputs
    x.grad = weights.grad = None
    start = time.perf_counter()
    combined, row_weights = side(*inputs)
    torch.autograd.backward((combined, row_weights), (x.detach(), row_weights.detach()))
    return time.perf_counter() - start


def keep_freed_memory() -> None:
    """Stop glibc from giving memory back: the page faults of fresh memory, equal on both sides, drown the difference."""
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
    print("tokens hidden top-k experts    ours ms   plain ms   plain/ours [quartiles]")
    for tokens, hidden, top_k, experts in SHAPES:
        x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
        expert_ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        weights = torch.rand(tokens, top_k, generator=generator).requires_grad_()
        inputs = (x, expert_ids, weights, experts)
        times: dict[Callable[..., tuple[Tensor, Tensor]], list[float]] = {ours: [], plain: []}
        for round_number in range(options.rounds + 3):
            for side in (ours, plain) if round_number % 2 else (plain, ours):
                times[side].append(measure(side, inputs))
        kept = {side: seconds[3:] for side, seconds in times.items()}  # the first rounds warm up
        ratios = [theirs / own for own, theirs in zip(kept[ours], kept[plain], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{tokens:6} {hidden:6} {top_k:5} {experts:7} {1e3 * statistics.median(kept[ours]):10.2f} "
            f"{1e3 * statistics.median(kept[plain]):10.2f}   {middle:5.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
