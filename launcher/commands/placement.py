"""`counterflow placement SOURCE`: placement of experts for inference by measured load, with replicas of busy ones."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.expert_loads import Loads, read_loads
from ...parallel.experts.placement import Replicated, imbalance, loads_of_ranks, place_replicas
from ...report.text.lines import WIDTH
from ...report.text.numbers import count
from ...report.text.table import align
from ...settings import UsageError

WRITE = (
    "write the map that SGLang takes as --init-expert-location: one row for each decoder layer, dense ones included, "
    "without MTP modules"
)


@dataclass(frozen=True)
class Predicted:
    """Placement of every layer, and its imbalance per layer: the load of the busiest rank over the mean."""

    loads: Loads
    layers: list[Replicated]
    before: list[float]
    """Imbalance with experts in their order; further places begin again with the first expert."""
    after: list[float]
    """Imbalance with the experts placed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Place experts for inference by the loads that a run measured: the busiest are held several times, groups stay "
        "on nodes, and every rank gets about as many tokens as any other. Prints how even the ranks would be."
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="a run folder, a checkpoint, or a JSON file with loads per layer")
    add("--ranks", type=int, required=True, metavar="N", help="expert parallel ranks")
    add("--replicas", type=int, metavar="N", help="places for experts on all ranks (default: as few as possible)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes that the ranks lie on (default 1)")
    add("--groups", type=int, metavar="N", help="the router's groups (default: the run's; 1 for a file without)")
    add("--write", type=Path, metavar="FILE", help=WRITE)
    add("--json", action="store_true", help="print phy2log, log2phy and counts of every layer as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Place experts, write the map and print the result."""
    loads = read_loads(args.source)
    groups = loads.groups if args.groups is None else args.groups
    if args.ranks < 1:
        raise UsageError(f"--ranks is {args.ranks}: it must be at least 1")
    experts = len(loads.tokens[0])
    replicas = -(-experts // args.ranks) * args.ranks if args.replicas is None else args.replicas
    placed = place(loads, replicas, groups, args.nodes, args.ranks)
    if args.write is not None:
        text = json.dumps({"physical_to_logical_map": decoder_map(placed)})
        try:
            args.write.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--write {args.write}: {error.strerror or error}") from None
    if args.json:
        print(json.dumps(to_json(placed, groups, args.nodes, args.ranks)))
    else:
        print(report(placed, groups, args.nodes, args.ranks))
    return 0


def place(loads: Loads, replicas: int, groups: int, nodes: int, ranks: int) -> Predicted:
    """Place the experts of each layer separately. Raises UsageError where the numbers do not fit each other."""
    layers = [place_replicas(layer, replicas, groups, nodes, ranks) for layer in loads.tokens]
    experts = len(loads.tokens[0])
    in_order = [place % experts for place in range(experts if experts % ranks == 0 else replicas)]

    def imbalances(placements: Sequence[Sequence[int]]) -> list[float]:
        return [imbalance(loads_of_ranks(layer, at, ranks)) for layer, at in zip(loads.tokens, placements, strict=True)]

    after = imbalances([layer.physical_to_logical for layer in layers])
    return Predicted(loads, layers, imbalances([in_order] * len(layers)), after)


def decoder_map(placed: Predicted) -> list[list[int]]:
    """Return the expert at each place of every decoder layer; the row of a dense layer has experts in their order."""
    rows = [list(layer.physical_to_logical) for layer in placed.layers]
    if placed.loads.decoder is None:
        return rows
    dense, decoder_layers = placed.loads.decoder
    in_order = [place % len(placed.loads.tokens[0]) for place in range(len(rows[0]))]
    return [in_order] * dense + rows[: decoder_layers - dense]


def to_json(placed: Predicted, groups: int, nodes: int, ranks: int) -> dict[str, Any]:
    """Return the result in EPLB's terms: phy2log `[L, P]`, log2phy `[L, E, X]` filled up with -1, counts `[L, E]`."""
    most = max(max(layer.counts) for layer in placed.layers)
    return {
        "measured": placed.loads.measured,
        "replicas": len(placed.layers[0].physical_to_logical),
        "groups": groups,
        "nodes": nodes,
        "ranks": ranks,
        "layers": list(placed.loads.layers),
        "imbalance_before": placed.before,
        "imbalance_after": placed.after,
        "phy2log": [list(layer.physical_to_logical) for layer in placed.layers],
        "log2phy": [
            [[*places, *[-1] * (most - len(places))] for places in layer.logical_to_physical] for layer in placed.layers
        ],
        "counts": [list(layer.counts) for layer in placed.layers],
    }


def report(placed: Predicted, groups: int, nodes: int, ranks: int) -> str:
    """Return a table with a row per layer, of at most 80 columns."""
    experts, replicas = len(placed.loads.tokens[0]), len(placed.layers[0].physical_to_logical)
    kept = f"; {groups} groups stay on their nodes" if nodes > 1 and groups % nodes == 0 else ""
    rows: list[tuple[str, ...]] = [("layer", "in order", "placed", "experts with replicas", "most of one")]
    for name, before, after, layer in zip(placed.loads.layers, placed.before, placed.after, placed.layers, strict=True):
        several = sum(copies > 1 for copies in layer.counts)
        rows.append((name, f"{before:.2f}", f"{after:.2f}", str(several), str(max(layer.counts))))
    if len(placed.layers) > 1:
        means = (sum(values) / len(values) for values in (placed.before, placed.after))
        rows.append(("mean", *(f"{mean:.2f}" for mean in means), "", ""))
    lines = [
        f"loads: {placed.loads.measured}",
        f"{experts} experts at {replicas} places on {ranks} ranks of {count(nodes, 'node')}{kept}",
        "busiest rank, x the mean:",
        *align(rows, left=frozenset()),
    ]
    return "\n".join(line if len(line) <= WIDTH else _fold(line) for line in lines)


def _fold(line: str) -> str:
    """Wrap a line, such as one with a long path."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
