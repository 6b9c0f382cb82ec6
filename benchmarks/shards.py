"""Packing and unpacking of a pipeline rank's gradients and weights: ours, and a loop over the ranks of a bucket.

    python -P benchmarks/shards.py [--rounds 10] [--columns 256]

The parameters are those of DeepSeek-V3 on a middle pipeline rank: two stages of four MoE layers, each layer with 4 of
256 experts. Dense parameters are cut over 256 ranks, experts over 4. Matrices have all their rows, and their columns
divided by `--columns`: so the number of copies counts and not their bytes, as on a GPU, where each copy is a launch.
Both sides run in turn in one process. The last line is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from counterflow.comm.flat import FlatDispatcher
from counterflow.configs.load import load_config
from counterflow.local_parameter import LocalParameter
from counterflow.model.naming import local_parameters
from counterflow.model.transformer import Part, Transformer
from counterflow.parallel.optimizer.shards import Plan, plan_buckets

CONFIG = "deepseek-v3-671b"
STAGES = (range(8, 12), range(32, 36))
LOCAL_EXPERTS = 4
RANKS = {"dp": 256, "edp": 4}


def parameters(columns: int) -> list[LocalParameter]:
    """Parameters of a middle rank, in BF16, with matrices narrowed."""
    model, found = load_config(CONFIG).model, []
    for layers in STAGES:
        with torch.device("meta"):
            part = Part(layers, first=False, last=False)
            chunk = Transformer(model, FlatDispatcher(None, LOCAL_EXPERTS), range(LOCAL_EXPERTS), part=part)
        for item in local_parameters(chunk):
            *more, width = item.parameter.shape
            shape = (*more, width if not more else max(1, width // columns))
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
            found.append(LocalParameter(parameter, item.names, item.replicas))
    return found


def loop_to_shards(plan: Plan, flat: Tensor, shards: Tensor) -> None:
    for slot in plan.slots:
        source = slot.in_bucket(flat)
        for rank in range(plan.ranks):
            rows = slot.owned(rank)
            target = slot.in_shard(shards[rank])
            target[:, : len(rows)] = source[:, rows.start : rows.stop]
            target[:, len(rows) :].zero_()


def loop_from_shards(plan: Plan, shards: Tensor) -> None:
    for slot in plan.slots:
        target = slot.local.parameter.detach().view(len(slot.local.names), slot.rows, slot.columns)
        for rank in range(plan.ranks):
            rows = slot.owned(rank)
            target[:, rows.start : rows.stop] = slot.in_shard(shards[rank])[:, : len(rows)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--columns", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    items = parameters(options.columns)
    plans = plan_buckets(items, lambda item: RANKS[item.replicas], 2**26)
    gradients = [torch.randn(plan.numel) for plan in plans]
    pieces = [torch.empty(plan.ranks, plan.shard_numel) for plan in plans]
    weights = [torch.randn(plan.ranks, plan.shard_numel).to(torch.bfloat16) for plan in plans]
    elements = sum(plan.numel for plan in plans)
    print(f"torch {torch.__version__}, {len(items)} parameters, {elements / 1e6:.1f} million elements")

    def side(pack: Callable[..., None], unpack: Callable[..., None]) -> tuple[float, float]:
        """Seconds to pack all gradients, and to unpack all weights."""
        started = time.perf_counter()
        for plan, flat, shards in zip(plans, gradients, pieces, strict=True):
            pack(plan, flat, shards)
        packed = time.perf_counter()
        for plan, shards in zip(plans, weights, strict=True):
            unpack(plan, shards)
        return packed - started, time.perf_counter() - packed

    side(Plan.to_shards, Plan.from_shards)  # every page has been touched
    ratios = []
    for _ in range(options.rounds):
        ours = side(Plan.to_shards, Plan.from_shards)
        loop = side(loop_to_shards, loop_from_shards)
        ratios.append(sum(ours) / sum(loop))
        print(
            f"pack {1e3 * ours[0]:7.1f} ms, loop {1e3 * loop[0]:7.1f} ms | "
            f"unpack {1e3 * ours[1]:7.1f} ms, loop {1e3 * loop[1]:7.1f} ms"
        )
    print(f"ours / loop: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
