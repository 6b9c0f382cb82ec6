"""Time the making, checking and simulating of schedules of the largest pipelines.

    python benchmarks/simulate.py [--ranks 64] [--microbatches 4096] [--schedules dualpipe,1f1b]

Prints for each schedule the seconds of every part, the number of actions, and the microseconds of all an action. The
same for a quarter of the micro-batches stands beside it: in linear time the cost of an action stays what it is.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

from counterflow.parallel.schedule.catalogue import find_schedule, schedule_names
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate


def measure(name: str, ranks: int, microbatches: int) -> tuple[list[float], int]:
    """Seconds to generate, simulate and check, and the number of actions."""
    marks = [time.perf_counter()]
    schedule = find_schedule(name)(ranks, microbatches)
    marks.append(time.perf_counter())
    simulate(schedule, Costs.uniform(schedule.num_stages, 10, 10, 10, overlapped=25, p2p=1))
    marks.append(time.perf_counter())
    check(schedule)
    marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)], sum(1 for _ in schedule.work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=4096)
    parser.add_argument("--schedules", default=",".join(schedule_names()))
    arguments = parser.parse_args()
    print(f"{'schedule':12} {'M':>6} {'generate':>9} {'simulate':>9} {'check':>9} {'actions':>10} {'us/action':>10}")
    for name in arguments.schedules.split(","):
        for microbatches in (arguments.microbatches // 4, arguments.microbatches):
            seconds, actions = measure(name, arguments.ranks, microbatches)
            shown = " ".join(f"{s:8.2f}s" for s in seconds)
            print(f"{name:12} {microbatches:6} {shown} {actions:10} {sum(seconds) / actions * 1e6:10.2f}", flush=True)


if __name__ == "__main__":
    main()
