"""Dry runs of small configurations, compared with what is known of them otherwise."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import dry_run
from counterflow.report.text.dryrun import dry_run_text

DOC = Path(__file__).parents[2] / "docs" / "dryrun.md"
KEYS = re.compile(r"^\| (`[a-z_`, ]+) \|", re.MULTILINE)
NAME = re.compile("`([a-z_]+)`")
SMALL = ("precision.recipe=bf16", "parallel.ep=4", "parallel.gpus_per_node=2", "memory.recompute=v3")


def test_a_rank_of_two_nodes_reports_every_key() -> None:
    run = dry_run(load_config("tiny", SMALL), world=8, rank=5, microbatches=2)
    result = json.loads(json.dumps(run.to_json()))
    for key in (
        *("peak_bytes", "at_peak", "kernels_per_moe_layer", "host_waits_per_moe_layer", "flops", "traffic"),
        *("collectives", "seconds"),
    ):
        assert result[key], key
    rows = KEYS.findall(DOC.read_text("utf-8").partition("## JSON")[2])
    documented = {name for row in rows for name in NAME.findall(row)}
    assert documented == result.keys()
    assert result["host_waits_per_moe_layer"] == 1
    assert sum(result["at_peak"].values()) <= result["peak_bytes"]
    assert all(len(line) <= 80 for line in dry_run_text(result).splitlines())


def test_a_forward_holds_less_the_more_is_recomputed() -> None:
    held = []
    for policy in ("full", "v3", "none"):
        run = dry_run(load_config("tiny", (*SMALL, f"memory.recompute={policy}")), 8, 0, 2, layer=False)
        action, alive = run.after_actions[0]
        assert action == "F0 of stage 0"
        held.append(alive - run.built_bytes)
    assert held == sorted(held) and len(set(held)) == 3, held


def test_no_graph_of_a_micro_batch_outlives_its_backward() -> None:
    dry_run(load_config("tiny", SMALL), 8, 0, 3, layer=False)
    gc.collect()
    left = [thing for thing in gc.get_objects() if type(thing).__name__ == "_DispatchWaitBackward"]
    assert not left, f"{len(left)} nodes are held by what they hold"


@pytest.mark.parametrize("policy", ["full", "v3", "none"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_micro_batch_leaves_nothing_behind(nodes: int, policy: str) -> None:
    """Inputs of every micro-batch would stay if a route held a tensor of the graph that holds the route."""
    config = load_config("tiny", (*SMALL, f"memory.recompute={policy}", f"parallel.gpus_per_node={4 // nodes}"))
    run = dry_run(config, 8, 0, 8, layer=False)
    alive = dict(run.after_actions)
    results = 4096  # losses and counts of a micro-batch
    first, seventh = alive["B0 of stage 0"], alive["B6 of stage 0"]  # the last one begins the reduction
    assert 0 <= seventh - first <= 6 * results
