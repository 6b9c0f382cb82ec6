"""Result of a dry run, and its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..comm.meter import Traffic
from .metering import Communicator
from .operations import is_product
from .recorder import Sent, Work
from .rules import Event


@dataclass(frozen=True)
class Layer:
    """Counts of one MoE layer and micro-batch: forward, backward and W."""

    kernels: Mapping[str, float]
    """Kernels by operation."""
    bytes: Mapping[str, float]
    """Bytes in and out of kernels by operation."""
    flops: float
    waits: Mapping[str, float]
    """Host waits by operation and place in the source."""

    @property
    def other_bytes(self) -> float:
        """Bytes in and out of kernels that are no matrix products."""
        return sum(bytes for name, bytes in self.bytes.items() if not is_product(name))


@dataclass(frozen=True)
class DryRun:
    """Everything that a dry run of one rank found out about a step."""

    config: str
    layout: str
    rank: int
    coordinates: tuple[int, int, int]
    """Pipeline, expert data parallel and expert parallel coordinates."""
    microbatches: int
    run_microbatches: int
    """Micro-batches that were run; the rest of a long step is extended from them, see `extend.py`."""
    in_flight: int
    """Most micro-batches with activations at once."""
    parameters: int
    routing: str
    load: float
    """Rows of this rank's experts over the mean of its group."""
    peak_bytes: int
    peak_label: str
    at_peak: Mapping[str, int]
    """Bytes at the peak by what was running when they were allocated."""
    built_bytes: int
    """Bytes alive before the step: weights, their FP32 masters, moments and sums of gradients."""
    after_actions: Sequence[tuple[str, int]]
    """Each action of the pipeline, and the bytes alive after it."""
    work: Mapping[str, Work]
    """By phase: F.NAME and B.NAME, W for weight gradients outside of phases, `update` for all that follows."""
    layer: Layer | None
    """None if the model has no MoE layer."""
    traffic: Mapping[str, Traffic]
    """Count of the product's own meter, by communicator."""
    sent: Sequence[Sent]
    communicators: Mapping[str, Communicator]
    program: Sequence[Event]
    """Launches and waits of all steps, for a rehearsal."""
    operations: frozenset[str]
    """Operations with a kernel, with their overloads."""
    mixed: Mapping[str, int]
    """Operations between the device and the host, by their place: a GPU refuses them, so there should be none."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the keys are documented in docs/dryrun.md."""
        kernels, moved = self._sum("kernels"), self._sum("bytes")
        return {
            "config": self.config,
            "layout": self.layout,
            "rank": self.rank,
            "coordinates": list(self.coordinates),
            "microbatches": self.microbatches,
            "run_microbatches": self.run_microbatches,
            "in_flight": self.in_flight,
            "parameters": self.parameters,
            "routing": {"name": self.routing, "load": self.load},
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_label,
            "at_peak": _largest_first(self.at_peak),
            "built_bytes": self.built_bytes,
            "after_actions": [list(pair) for pair in self.after_actions],
            "kernels_per_moe_layer": None if self.layer is None else sum(self.layer.kernels.values()),
            "host_waits_per_moe_layer": None if self.layer is None else sum(self.layer.waits.values()),
            "moe_layer": None
            if self.layer is None
            else {
                "kernels": _largest_first(self.layer.kernels),
                "bytes": _largest_first(self.layer.bytes),
                "bytes_without_products": self.layer.other_bytes,
                "flops": self.layer.flops,
                "host_waits": _largest_first(self.layer.waits),
            },
            "kernels": _largest_first(kernels),
            "kernels_by_phase": {label: sum(work.kernels.values()) for label, work in self.work.items()},
            "bytes": _largest_first(moved),
            "bytes_by_phase": {label: sum(work.bytes.values()) for label, work in self.work.items()},
            "bytes_without_products": sum(bytes for name, bytes in moved.items() if not is_product(name)),
            "flops": sum(work.flops for work in self.work.values()),
            "flops_by_phase": {label: work.flops for label, work in self.work.items() if work.flops},
            "host_waits": {label: _largest_first(work.waits) for label, work in self.work.items() if work.waits},
            "traffic": [
                {**vars(kind), "communicator": name, "bytes": tally.bytes, "messages": tally.messages}
                for name, traffic in self.traffic.items()
                for kind, tally in traffic.items()
            ],
            "communicators": {
                name: {"use": each.use, "ranks": _compact(each.ranks)} for name, each in self.communicators.items()
            },
            "collectives": [list(each) for each in self.sent],
            "operations": sorted(self.operations),
            "mixed_devices": dict(self.mixed),
            "seconds": dict(self.seconds),
        }

    def _sum(self, field: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for work in self.work.values():
            total.update(getattr(work, field))
        return total


def _largest_first(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(numbers.items(), key=lambda item: -item[1]))


def _compact(ranks: Sequence[int]) -> dict[str, int] | list[int]:
    """Evenly spaced ranks as their first, step and number; others as they are."""
    steps = {after - before for before, after in pairwise(ranks)}
    if len(ranks) > 2 and len(steps) == 1:
        return {"first": ranks[0], "step": steps.pop(), "number": len(ranks)}
    return list(ranks)
