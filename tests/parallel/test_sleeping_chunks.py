"""Stages of `benchmarks/pipeline.py`, which take the simulated time and do real work in that time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from counterflow.benchmarks.pipeline import RANKS, make_runners, run_rounds, simulated_units
from counterflow.benchmarks.pipeline_chunks import COSTS, SHAPE, Device, SleepingChunk
from counterflow.comm.p2p import PipelineChannels
from counterflow.parallel.executor import Executor, Program, microbatches_of
from counterflow.parallel.overlap_orders import find_order
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.tests.pool import Pool, Worker

MICRO_BATCHES = 8


class ManualClock(Device):
    """A device whose clock moves only by sleeping."""

    def __init__(self) -> None:
        super().__init__(unit=1.0)
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("1f1b", {}),
        ("zb1p", {}),
        ("dualpipev", {}),  # on one rank, which holds both stages, nothing is sent
        ("dualpipev", {"defer_weights": True}),
    ],
)
def test_every_action_takes_exactly_its_cost(name: str, options: dict[str, Any]) -> None:
    schedule = find_schedule(name)(1, MICRO_BATCHES, **options)
    device = ManualClock()
    chunks = {stage: SleepingChunk(stage, schedule.num_stages, device) for stage in schedule.stages_of_rank[0]}
    unconnected: PipelineChannels = None  # type: ignore[assignment]
    executor = Executor(chunks, unconnected, find_order("v3"), SHAPE, torch.float32, torch.device("cpu"))
    starts: list[float] = []
    watch = SimpleNamespace(
        begin=lambda action: starts.append(device.now()), phase=lambda side, name: None, end=lambda action: None
    )
    executor.train(Program.of(schedule, 0), torch.zeros(MICRO_BATCHES, *SHAPE).unbind(), watch=watch)
    simulated = simulate(schedule, Costs.uniform(schedule.num_stages, **COSTS))
    assert starts == pytest.approx([span.start for span in simulated.spans[0]])
    assert device.now() == pytest.approx(simulated.step_time)


def test_both_sides_compute_every_weight_gradient_once(pool: Pool) -> None:
    for runs in pool.run(_gradient_errors, RANKS):
        assert runs == {side: pytest.approx(0.0, abs=1e-6) for side in runs}


def _gradient_errors(worker: Worker) -> dict[tuple[str, str], float]:
    """Largest error of a bias's gradient, which is that of a mean over H through stages that add their biases."""
    errors = {}
    for side, runner in make_runners(worker.rank, MICRO_BATCHES, ManualClock()).items():
        for _ in range(2):  # torch's first step also runs its modules to learn their shapes
            for module in runner.modules.values():
                module.zero_grad()
            runner.step()
        served = microbatches_of(runner.schedule, worker.rank)
        errors[side] = max(
            float((bias.grad - served[stage] / SHAPE[-1]).abs().max())
            for stage, module in runner.modules.items()
            for bias in module.parameters()
        )
    return errors


def test_steps_take_no_less_than_simulated(pool: Pool) -> None:
    unit, rounds = 0.002, 2
    by_rank = pool.run(run_rounds, RANKS, unit, MICRO_BATCHES, rounds)
    simulated = by_rank[0][1]
    assert len(simulated) == 8
    for side, expected in simulated.items():
        for number in range(rounds):
            steps = [times[side][number] for times, _ in by_rank]
            seconds = max(end for _, end in steps) - min(start for start, _ in steps)
            assert expected <= seconds, side


def test_torch_orders_cost_what_ours_do(pool: Pool) -> None:
    """Equal costs allow both in one line of the table."""
    (units,) = {tuple(sorted(found.items())) for found in pool.run(_simulated, RANKS)}
    found = dict(units)
    for name in ("1f1b", "dualpipev"):
        assert found[name, "torch.distributed.pipelining"] == found[name, "counterflow"]
    assert found["1f1b", "counterflow"] == (20 + RANKS - 1) * 3
    assert found["dualpipev", "counterflow"] == 109  # F = I = W = 10 ms, a pair 25 ms: 1090 ms in DeepSeek's own code


def _simulated(worker: Worker) -> dict[tuple[str, str], float]:
    runners = make_runners(worker.rank, 20, ManualClock())
    return {side: simulated_units(runner.schedule) for side, runner in runners.items()}
