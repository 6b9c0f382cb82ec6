"""Kernels that route rows, at DeepSeek-V3's sizes: time of each, and its share of the speed of a plain copy.

    python -P benchmarks/routes.py [--tokens 4096] [--rounds 30] [--device cuda]

One rank of 64 on 8 nodes, 256 experts, top 8 on at most 4 nodes, hidden 7168 in BF16. Bytes are those that a kernel has
to read and write, each once; "copy" is the time of a copy of as many bytes, the memory's limit. Kernels that compute
indices move little and are compared with nothing. The time is the median of the rounds, each on memory that the L2
cache does not hold. With `--device cpu` the formulas run instead, which tests the program and not the speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterflow.kernels.routes import index, rows

HIDDEN, EXPERTS, TOP_K, NODES, RANKS, LIMIT = 7168, 256, 8, 8, 64, 4
FLUSHED = 256 * 2**20
"""Bytes written between two rounds, several times the L2 cache."""
Case = tuple[str, Callable[[], Any], int]
"""Name, call, and bytes that have to be moved; 0 for indices."""


def routing(tokens: int) -> Tensor:
    """Experts int64 `[T, K]` on at most LIMIT nodes per token."""
    reached = torch.rand(tokens, NODES).argsort(1)[:, :LIMIT]
    allowed = torch.zeros(tokens, NODES).scatter_(1, reached, 1.0).repeat_interleave(EXPERTS // NODES, 1)
    return (torch.rand(tokens, EXPERTS) * allowed).topk(TOP_K).indices


def moved(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cases(tokens: int, device: torch.device) -> list[Case]:
    """Steps of a rank's dispatch and combine: to the nodes, at a relay, and at the experts' rank."""
    ids = routing(tokens).to(device)
    weights = torch.rand(ids.shape, device=device)
    x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
    bounds = torch.arange(0, EXPERTS + 1, EXPERTS // NODES, dtype=torch.int32, device=device)
    each = torch.arange(NODES + 1, dtype=torch.int32, device=device)
    ranges = torch.stack((bounds[:-1], bounds[1:]), 1).contiguous()
    positions = index.number_copies(ids, bounds)
    count = int((positions >= 0).sum())
    messages = rows.spread_messages(x, weights, ids, positions, count, torch.int16)
    end, start, ids_start, ids_end = rows.message_ends(2 * HIDDEN, TOP_K, torch.int16)
    local = EXPERTS // RANKS
    arrived = messages[:, ids_start:ids_end].view(torch.int16), messages[:, start:ids_start].view(torch.float32)
    here = (arrived[0][:, :, None] == torch.arange(local, device=device)).any(1)
    counts, sent = here.sum(0).unsqueeze(0), torch.tensor([count], device=device)
    arguments = *arrived, counts, sent, each[:1].long(), None, 0, 16
    padded = int((-(-counts // 16) * 16).sum())
    arrival, _, row_of_slot, _ = index.expand_tokens(*arguments, padded)
    expert_rows = rows.gather_rows(messages[:, :end], arrival).view(torch.bfloat16)
    back = rows.spread_rows(x, positions, count)
    return [
        ("count_tokens", lambda: index.count_tokens(ids, ranges, each, each[:-1], NODES), 0),
        ("number_copies", lambda: index.number_copies(ids, bounds), 0),
        ("number_copies, in messages", lambda: index.number_copies(arrived[0], bounds), 0),
        ("expand_tokens, one source", lambda: index.expand_tokens(*arguments, padded), 0),
        ("order_slots", lambda: index.order_slots(ids, EXPERTS, local), 0),
        (
            "spread_messages",
            lambda: rows.spread_messages(x, weights, ids, positions, count, torch.int16),
            moved(x, messages),
        ),
        ("spread_rows", lambda: rows.spread_rows(x, positions, count), moved(x, back)),
        ("gather_rows", lambda: rows.gather_rows(messages[:, :end], arrival), 2 * moved(expert_rows)),
        ("sum_copies, by node", lambda: rows.sum_copies(back, positions), moved(x, back)),
        (
            "sum_copies, by slot",
            lambda: rows.sum_copies(expert_rows, row_of_slot),
            moved(expert_rows) + 2 * HIDDEN * count,
        ),
    ]


def seconds(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median time of a call."""
    call()
    found = []
    for _ in range(rounds):
        if device.type != "cuda":
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
            continue
        torch.empty(FLUSHED, dtype=torch.uint8, device=device).fill_(0)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{'kernel':28} {'us':>9} {'GB/s':>8} {'of copy':>8}")
    for name, call, size in cases(args.tokens, device):
        took = seconds(call, args.rounds, device)
        if not size:
            print(f"{name:28} {took * 1e6:9.1f}")
            continue
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)
        copy = seconds(source.clone, args.rounds, device)
        print(f"{name:28} {took * 1e6:9.1f} {size / took / 1e9:8.0f} {copy / took:8.2f}")


if __name__ == "__main__":
    main()
