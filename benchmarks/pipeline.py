"""Cost of a schedule on real processes beyond its simulated step, compared with torch.distributed.pipelining.

    python -P benchmarks/pipeline.py [--rounds 5] [--unit 0.1] [--microbatches 20]

Four processes over gloo. A stage computes on an emulated device: its host waits for the device, as for a GPU. F, I and
W take a unit of 0.1 s each, an overlapped pair 2.5 units; activations and gradients of 256 KiB really pass between the
processes. All schedules of both sides run in turn in the same processes, in the opposite order every other round. A
step is measured from the first rank's start to the last rank's end. Its ratio is to the simulated step of the same
order, with free communication.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from counterflow.benchmarks.pipeline_chunks import COSTS, SHAPE, Device, SleepingChunk, SleepingModule, sleep_exactly
from counterflow.comm.p2p import PipelineChannels
from counterflow.parallel.executor import Executor, Program
from counterflow.parallel.overlap_orders import find_order
from counterflow.parallel.schedule.actions import Action, Overlap, Schedule
from counterflow.parallel.schedule.catalogue import find_schedule, schedule_names
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.tests.pool import Pool, Worker

RANKS = 4
WARM_UP_UNIT = 0.002
CPU = torch.device("cpu")
OURS, TORCH = "counterflow", "torch.distributed.pipelining"
Side = tuple[str, str]  # schedule, implementation


@dataclass
class Runner:
    """A schedule on this rank, ready to run steps."""

    step: Callable[[], object]
    schedule: Schedule
    """The order that it runs."""
    modules: Mapping[int, nn.Module]
    """Modules by stage."""


def our_runner(name: str, num_microbatches: int, rank: int, channels: PipelineChannels, device: Device) -> Runner:
    schedule = find_schedule(name)(RANKS, num_microbatches)
    chunks = {stage: SleepingChunk(stage, schedule.num_stages, device) for stage in schedule.stages_of_rank[rank]}
    executor = Executor(chunks, channels, find_order("v3"), SHAPE, torch.float32, CPU)
    program = Program.of(schedule, rank)
    micro_batches = torch.zeros(num_microbatches, *SHAPE).unbind()
    return Runner(lambda: executor.train(program, micro_batches), schedule, chunks)


def torch_runner(name: str, num_microbatches: int, rank: int, device: Device) -> Runner:
    from torch.distributed import pipelining

    schedule = find_schedule(name)(RANKS, num_microbatches)
    last_stage = schedule.num_stages - 1
    modules = {stage: SleepingModule(device) for stage in schedule.stages_of_rank[rank]}
    stages = [pipelining.PipelineStage(module, stage, last_stage + 1, CPU) for stage, module in modules.items()]
    settings = {"n_microbatches": num_microbatches, "loss_fn": lambda output, _: output.mean(), "scale_grads": False}
    if len(stages) == 1:
        # Its order is a loop: P - r forwards, then a backward and a forward in turn, the same as our order.
        runs = pipelining.Schedule1F1B(stages[0], **settings)
    else:
        runs = pipelining.schedules.ScheduleDualPipeV(stages, **settings)
        schedule = replace(schedule, actions=read_torch_order(runs.pipeline_order))
        for pair in (action for action in schedule.actions[rank] if isinstance(action, Overlap)):
            modules[pair.forward.stage].paired.add(pair.forward.microbatch)
    inputs = (torch.zeros(num_microbatches * SHAPE[0], *SHAPE[1:]),) if 0 in modules else ()
    targets = {"target": torch.zeros(num_microbatches * SHAPE[0])} if last_stage in modules else {}

    def step() -> None:
        for module in modules.values():
            module.next_microbatch = 0
        runs.step(*inputs, **targets, return_outputs=False)

    return Runner(step, schedule, modules)


def read_torch_order(order: Mapping[int, Sequence[Any]]) -> tuple[tuple[Action | Overlap, ...], ...]:
    """Translate the order of a torch schedule of several stages per rank into our actions."""

    def read(action: Any) -> Action | Overlap | None:
        if action is None:
            return None
        if action.sub_actions is not None:
            return Overlap(*map(read, action.sub_actions))
        kind = action.computation_type.value
        return Action(kind, action.stage_index, action.microbatch_index) if kind in ("F", "B", "I", "W") else None

    return tuple(tuple(filter(None, map(read, order[rank]))) for rank in range(RANKS))


def make_runners(rank: int, num_microbatches: int, device: Device) -> dict[Side, Runner]:
    ranks = list(range(RANKS))
    groups = {(a, b): dist.new_group([a, b]) for a in ranks for b in ranks if a != b}
    own = {pair: group for pair, group in groups.items() if dist.get_rank() in pair}
    channels = PipelineChannels(dist.get_rank(), own)
    runners = {}
    for name in schedule_names():
        runners[name, OURS] = our_runner(name, num_microbatches, rank, channels, device)
        if name in ("1f1b", "dualpipev"):
            runners[name, TORCH] = torch_runner(name, num_microbatches, rank, device)
    return runners


def run_rounds(
    worker: Worker, unit: float, num_microbatches: int, rounds: int
) -> tuple[dict[Side, list[tuple[float, float]]], dict[Side, float]]:
    """Start and end of every step on this rank, and the simulated steps, in seconds."""
    torch.set_num_threads(1)
    sleep_exactly()
    device = Device(WARM_UP_UNIT)
    runners = make_runners(worker.rank, num_microbatches, device)
    for runner in runners.values():
        runner.step()
    device.unit = unit
    times: dict[Side, list[tuple[float, float]]] = {side: [] for side in runners}
    for turn in range(rounds):
        for side in list(runners)[:: 1 if turn % 2 == 0 else -1]:
            dist.barrier()
            start = time.perf_counter()  # all processes of a machine share this clock
            runners[side].step()
            times[side].append((start, time.perf_counter()))
    return times, {side: unit * simulated_units(runner.schedule) for side, runner in runners.items()}


def simulated_units(schedule: Schedule) -> float:
    return simulate(schedule, Costs.uniform(schedule.num_stages, **COSTS)).step_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unit", type=float, default=0.1, help="seconds that F, I and W take, each")
    parser.add_argument("--microbatches", type=int, default=20)
    options = parser.parse_args()
    round_seconds = 60 * options.unit * options.microbatches  # more than all sides' steps together
    pool = Pool()
    try:
        arguments = options.unit, options.microbatches, options.rounds
        by_rank = pool.run(run_rounds, RANKS, *arguments, timeout=60 + 2 * options.rounds * round_seconds)
    finally:
        pool.close()
    print(
        f"torch {torch.__version__}, {RANKS} processes, {options.microbatches} micro-batches, {options.rounds} rounds; "
        f"F = I = W = {options.unit:g} s, pair {options.unit * COSTS['overlapped']:g} s"
    )
    print(f"{'schedule':<12} {'run by':<29} {'simulated s':>11}   measured s [least, most]   / simulated [least, most]")
    simulated = by_rank[0][1]
    for side, expected in simulated.items():
        report(side, expected, list(zip(*(times[side] for times, _ in by_rank), strict=True)))


def report(side: Side, simulated: float, steps: list[tuple[tuple[float, float], ...]]) -> None:
    """Print a line of the table; `steps` holds for each round every rank's start and end."""
    seconds = [max(end for _, end in ranks) - min(start for start, _ in ranks) for ranks in steps]
    least, middle, most = min(seconds), statistics.median(seconds), max(seconds)
    print(
        f"{side[0]:<12} {side[1]:<29} {simulated:>11.3f}   {middle:7.3f} [{least:7.3f}, {most:7.3f}]   "
        f"{middle / simulated:9.4f} [{least / simulated:.4f}, {most / simulated:.4f}]"
    )


if __name__ == "__main__":
    main()
