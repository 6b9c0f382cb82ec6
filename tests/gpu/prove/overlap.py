"""Communication that an overlapped pair exposes, between two ranks that share the GPU.

exposed = (pair - compute) / (blocking - compute): the pair of a forward and a backward of layers with EP 2, the same
with all experts on each rank, and the pair that waits for every transfer where it is launched. Over gloo the tensors
pass through the host's memory, so the share shows that the engine overlaps, not what NVLink would leave.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from counterflow.comm import flat
from counterflow.comm.exchange import Exchange
from counterflow.comm.flat import FlatDispatcher
from counterflow.model.naming import initialise
from counterflow.model.transformer import LossWeights, MicroBatch, Part, Transformer
from counterflow.parallel.overlap import run_pair
from counterflow.parallel.overlap_orders import find_order
from counterflow.phases import Tape
from counterflow.phases import run as run_phases
from counterflow.tests.gpu.prove.ranks import together
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup
from counterflow.weight_gradients import drain

LAYERS = 4


def run(setup: Setup, report: Report) -> None:
    times = together(setup, 2, "gloo", measure)
    slower = {name: max(rank[name] for rank in times) for name in times[0]}
    for name, seconds in slower.items():
        report.number(f"{name}, ms", seconds * 1e3)
    communication = slower["blocking"] - slower["compute"]
    report.number("exposed share of the communication, order v3", (slower["v3"] - slower["compute"]) / communication)
    report.number("exposed share, one after the other", (slower["sequence"] - slower["compute"]) / communication)
    report.check("a pair runs in every order", all(seconds > 0 for seconds in slower.values()))


class _Waiting(Exchange):
    """An exchange that is waited for where it is launched."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._result: Any = super().wait()

    def wait(self) -> Any:
        result, self._result = self._result, None
        return result


class _Pairs:
    """Layers from the middle of a model, and the micro-batch whose backward comes next."""

    def __init__(self, setup: Setup, group: dist.ProcessGroup | None) -> None:
        config = setup.wide(LAYERS, *setup.pick(("model.hidden_size=4096", "model.num_attention_heads=16"), ())).model
        experts, ranks = config.n_routed_experts, 1 if group is None else group.size()
        first = 0 if group is None else group.rank() * experts // ranks
        local, part = range(first, first + experts // ranks), Part(range(LAYERS), first=False, last=False)
        with setup.device:
            self.chunk = Transformer(config, FlatDispatcher(group, experts), local, part=part)
        initialise(self.chunk, seed=0)
        self.chunk.bfloat16()
        length = setup.pick(2048, 16)
        tokens = torch.zeros(1, length + 1, dtype=torch.int64, device=setup.device)
        valid = torch.ones(1, dtype=torch.bool, device=setup.device)
        self.batch = MicroBatch(tokens, valid, LossWeights(balance=0.0))
        self.x = torch.randn(1, length, config.hidden_size, device=setup.device).bfloat16()
        self.tape = Tape()
        run_phases(self._forward())

    def _forward(self) -> Any:
        return self.chunk.phases(self.batch, self.tape.enter(self.x), self.tape)

    def run(self, order: tuple[str, ...]) -> None:
        before, self.tape = self.tape, Tape()
        deferred: deque[Callable[[], None]] = deque()
        run_pair(self._forward(), before.backward(self.x, self.chunk.weight_queue, deferred), deferred, order)
        drain(deferred)
        self.chunk.zero_grad()


def measure(setup: Setup) -> dict[str, float]:
    """Median seconds of a pair on this rank, by side."""
    group = dist.group.WORLD
    assert group is not None
    local, shared, v3 = _Pairs(setup, None), _Pairs(setup, group), find_order("v3")
    sides: dict[str, Callable[[], None]] = {
        "compute": lambda: local.run(v3),
        "blocking": lambda: _blocking(shared),
        "sequence": lambda: shared.run(()),
        "v3": lambda: shared.run(v3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(setup.pick(6, 2)):
        for name, side in sides.items():
            setup.synchronize()
            dist.barrier()
            start = time.perf_counter()
            side()
            setup.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _blocking(shared: _Pairs) -> None:
    with mock.patch.object(flat, "Exchange", _Waiting):
        shared.run(())
