"""Text that `counterflow dryrun` prints about a rank's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .lines import name_rows
from .numbers import format_bytes, format_count, share
from .table import align

MOST = 8
"""Rows of a table of the largest."""


def dry_run_text(run: Mapping[str, Any]) -> str:
    """Report of a dry run, from its JSON: memory, one MoE layer, the phases, and the messages."""
    pp, edp, ep = run["coordinates"]
    rows = {
        "rank": f"{run['rank']}: pp {pp}, edp {edp}, ep {ep} of {run['layout']}",
        "parameters": format_count(run["parameters"]),
        "micro-batches": f"{run['microbatches']}, at most {run['in_flight']} with activations{_extended(run)}",
        "routing": f"{run['routing']['name']}, {run['routing']['load']:.2f} x the mean on this rank",
        "memory": f"{format_bytes(run['peak_bytes'])} of tensors at the peak, in {run['peak_phase']}",
        "before the step": format_bytes(run["built_bytes"]),
        "products": f"{run['flops'] / 1e12:.1f} TFLOP",
        "other kernels": f"{run['bytes_without_products'] / 1e9:.1f} GB in and out",
    }
    lines = [run["config"], *name_rows(rows), "", "At the peak, by what was running when it was allocated"]
    peak = run["peak_bytes"]
    largest = [(name, bytes) for name, bytes in run["at_peak"].items() if bytes >= peak / 1000]
    lines += align([("", "bytes", ""), *((n, format_bytes(b), share(b / peak)) for n, b in largest)], frozenset({0}))
    if run["moe_layer"] is not None:
        lines += ["", "One MoE layer and micro-batch, forward + backward + W", *_layer_rows(run)]
    lines += ["", "Phases", *_phases(run)]
    if run["traffic"]:
        lines += ["", "Sent by this rank in the step, payload"]
        heading = ("", "collective", "nodes", "bytes", "messages")
        totals: dict[tuple[str, str, str], list[int]] = {}
        for each in run["traffic"]:
            total = totals.setdefault((each["purpose"], each["collective"], each["link"]), [0, 0])
            total[0] += each["bytes"]
            total[1] += each["messages"]
        sent = [(*kind, format_bytes(bytes), str(messages)) for kind, (bytes, messages) in totals.items()]
        lines += align([heading, *sent], frozenset({0, 1, 2}))
    lines += ["", f"{sum(run['seconds'].values()):.1f} s, {len(run['collectives'])} collectives"]
    return "\n".join(lines)


def _extended(run: Mapping[str, Any]) -> str:
    fewer: int = run["run_microbatches"]
    return "" if fewer == run["microbatches"] else f"; extended from {fewer}"


def _layer_rows(run: Mapping[str, Any]) -> list[str]:
    layer = run["moe_layer"]
    rows = {
        "kernels": f"{run['kernels_per_moe_layer']:.0f}",
        "host waits": f"{run['host_waits_per_moe_layer']:.0f}",
        "other bytes": f"{layer['bytes_without_products'] / 1e9:.2f} GB in and out of kernels that are no products",
        "products": f"{layer['flops'] / 1e12:.2f} TFLOP",
    }
    table = [("kernels", "", "bytes")]
    for name, number in list(layer["kernels"].items())[:MOST]:
        table.append((f"{number:.0f}", name, f"{layer['bytes'].get(name, 0) / 1e9:.2f} GB"))
    return [*name_rows(rows), *("  " + line for line in align(table, frozenset({1})))]


def _phases(run: Mapping[str, Any]) -> list[str]:
    table = [("", "kernels", "bytes", "TFLOP", "host waits")]
    for label, kernels in run["kernels_by_phase"].items():
        waits = sum(run["host_waits"].get(label, {}).values())
        flops = run["flops_by_phase"].get(label, 0) / 1e12
        table.append(
            (
                label,
                str(kernels),
                f"{run['bytes_by_phase'][label] / 1e9:.1f} GB",
                f"{flops:.1f}" if flops else "",
                str(waits or ""),
            )
        )
    return align(table, frozenset({0}))
