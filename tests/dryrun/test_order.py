"""One order of collectives on all ranks of each communicator, and no operation between the host and the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest

from counterflow.configs.load import load_config
from counterflow.dryrun.metering import Communicator
from counterflow.dryrun.rank import dry_run
from counterflow.dryrun.recorder import Sent
from counterflow.dryrun.result import DryRun

EQUAL_BYTES = ("allreduce", "allgather_base", "reduce_scatter_base")
SMALL = ("model.num_hidden_layers=4", "optim.bucket_mb=0.1")
LAYOUTS = {
    "dualpipe, two hops, replicated experts": (
        8,
        *("parallel.pp=2", "parallel.ep=2", "parallel.gpus_per_node=1", "parallel.schedule=dualpipe"),
        *("precision.recipe=bf16", "memory.recompute=v3"),
    ),
    "dualpipev, one hop, fp8": (4, "parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev"),
    "1f1b, pipeline of four": (4, "parallel.pp=4", "parallel.schedule=1f1b", "precision.recipe=bf16"),
    "zb1p, bf16 reductions": (
        8,
        *("parallel.pp=2", "parallel.ep=4", "parallel.schedule=zb1p", "precision.recipe=bf16", "optim.reduce=bf16"),
    ),
    "interleaved, full recompute": (
        4,
        *("parallel.pp=2", "parallel.ep=2", "parallel.schedule=interleaved", "memory.recompute=full"),
    ),
}
LONG = list(LAYOUTS)[2:]


def disagreements(runs: Mapping[int, DryRun]) -> list[str]:
    """Communicators whose ranks launch other collectives, or in another order, than their first rank."""
    launched: dict[Communicator, dict[int, list[tuple[str, int]]]] = defaultdict(dict)
    for rank, run in runs.items():
        for sent in run.sent:
            group = run.communicators[sent.communicator]
            launched[group].setdefault(rank, []).append(_seen(sent))
    found = []
    for group, by_rank in launched.items():
        first = by_rank.get(group.ranks[0])
        found += [f"{group}: rank {rank}" for rank in group.ranks if by_rank.get(rank) != first]
    return found


def _seen(sent: Sent) -> tuple[str, int]:
    """Part that all ranks have to agree on: a send and its receive count as the same."""
    operation = "transfer" if sent.operation in ("send", "recv") else sent.operation
    return operation, sent.bytes if operation in EQUAL_BYTES else 0


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in LAYOUTS])
def test_ranks_launch_the_collectives_of_a_communicator_in_one_order(name: str) -> None:
    world, *settings = LAYOUTS[name]
    config = load_config("tiny", (*SMALL, *settings))
    runs = {rank: dry_run(config, world, rank, 4, layer=False) for rank in range(world)}
    uses = {group.use for run in runs.values() for group in run.communicators.values()}
    assert "world" in uses and any(use.startswith("dp") for use in uses), uses
    assert disagreements(runs) == []
    assert [run.mixed for run in runs.values() if run.mixed] == []


def test_a_swapped_order_is_found() -> None:
    world, *settings = LAYOUTS["dualpipev, one hop, fp8"]
    config = load_config("tiny", (*SMALL, *settings))
    runs = {rank: dry_run(config, world, rank, 4, layer=False) for rank in (0, 1)}
    swapped = list(runs[1].sent)
    uses = [runs[1].communicators[sent.communicator].use for sent in swapped]
    in_dp = [index for index, use in enumerate(uses) if use == "dp"]
    here, there = next((i, j) for i, j in pairwise(in_dp) if swapped[i].bytes != swapped[j].bytes)
    swapped[here], swapped[there] = swapped[there], swapped[here]
    found = disagreements({0: runs[0], 1: replace(runs[1], sent=swapped)})
    assert any("use='dp'" in each and each.endswith("rank 1") for each in found)
