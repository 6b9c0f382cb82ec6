"""Time and memory of dry runs themselves, each in a process of its own on one core.

    python benchmarks/dryrun.py [--all] [--only TEXT]

Runs whole steps of deepseek-v3-671b on 2,048 ranks, of the first, a middle and the last pipeline rank, and of
deepseek-v3-16b on 8 and on 512. Without --all every schedule, dispatcher, recompute policy and format occurs with each
model, but not every combination. Prints CPU seconds and gigabytes of each process, and the peak that it found; ends
with an error above 90 s or 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

SECONDS, GIB = 90.0, 4.0
SCHEDULES = ("dualpipe", "dualpipev", "zb1p", "1f1b", "interleaved", "gpipe")
RECOMPUTE = ("none", "v3", "full")
DISPATCHERS = ("two-hop", "flat")
RECIPES = ("bf16", "fp8")
V3_RANKS = (0, 896, 1920)


class Case(NamedTuple):
    """A dry run: configuration, ranks, rank, and what is set."""

    config: str
    world: int
    rank: int
    settings: tuple[str, ...]

    def __str__(self) -> str:
        shown = " ".join(setting.rpartition("=")[2] for setting in self.settings)
        return f"{self.config.removeprefix('deepseek-v3-')} {self.rank} of {self.world} {shown}"


def cases(every: bool) -> Iterator[Case]:
    """All combinations, or a few in which every value occurs with every rank of a model."""
    for recompute, dispatcher, recipe in product(RECOMPUTE, DISPATCHERS, RECIPES):
        kinds = (f"memory.recompute={recompute}", f"comm.dispatcher={dispatcher}", f"precision.recipe={recipe}")
        number = RECOMPUTE.index(recompute) + 2 * DISPATCHERS.index(dispatcher) + RECIPES.index(recipe)
        for turn, rank in enumerate(V3_RANKS):
            for place, schedule in enumerate(SCHEDULES):
                if every or (number + turn) % len(SCHEDULES) == place:
                    yield Case("deepseek-v3-671b", 2048, rank, (*kinds, f"parallel.schedule={schedule}"))
        for world in (8, 512):
            if every or (number + world // 512) % 2:
                yield Case("deepseek-v3-16b", world, world - 1, kinds)


def measure(case: Case) -> tuple[float, float, dict[str, object]]:
    """CPU seconds and GiB of the process, and the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        settings = [argument for setting in case.settings for argument in ("--set", setting)]
        command = [sys.executable, "-P", "-m", "counterflow", "dryrun", case.config, "--json", str(file), *settings]
        command += ["--world", str(case.world), "--rank", str(case.rank)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        assert process.stderr is not None
        error = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = usage.ru_utime + usage.ru_stime  # of one thread: the time on an idle core
        if status:
            return seconds, usage.ru_maxrss / 2**20, {"error": error.strip().splitlines()[-1] if error else status}
        return seconds, usage.ru_maxrss / 2**20, json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="run the cases whose printed name contains this")
    arguments = parser.parse_args()
    most = [0.0, 0.0]
    print(f"{'case':62} {'s':>6} {'GiB':>5}  {'peak GiB':>8} {'micro-batches':>13}")
    for case in cases(arguments.all):
        if arguments.only not in str(case):
            continue
        seconds, gib, found = measure(case)
        most = [max(most[0], seconds), max(most[1], gib)]
        if "error" in found:
            print(f"{case!s:62} {seconds:6.1f} {gib:5.2f}  {found['error']}", flush=True)
            continue
        peak = float(str(found["peak_bytes"])) / 2**30
        print(f"{case!s:62} {seconds:6.1f} {gib:5.2f}  {peak:8.1f} {found['microbatches']!s:>13}", flush=True)
    print(f"most: {most[0]:.1f} s of {SECONDS:.0f}, {most[1]:.2f} GiB of {GIB:.0f}")
    if most[0] > SECONDS or most[1] > GIB:
        raise SystemExit("a dry run took too much")


if __name__ == "__main__":
    main()
