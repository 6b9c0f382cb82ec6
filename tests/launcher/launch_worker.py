"""Rank for the tests of the launcher: `launch_worker.py MODE LOGS_FOLDER`. MODE is the failure of rank 1."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from counterflow.launcher.environment import WorkerEnvironment, read_environment
from counterflow.launcher.failures import supervised
from counterflow.launcher.logs import open_log
from counterflow.settings import UsageError

FOREVER = 600.0


def misbehave(mode: str, worker: WorkerEnvironment) -> None:
    if worker.rank != 1:
        return
    if mode == "raise":
        raise ArithmeticError("the cause")
    if mode == "usage":
        raise UsageError("data.path is missing: set it")
    if mode == "abort":
        os.write(2, b"[rank1] Watchdog caught collective operation timeout\n")
        os.abort()
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def reduce_until(mode: str, worker: WorkerEnvironment) -> None:
    """Keep every rank in collectives until rank 1 misbehaves, or for a few rounds if it does not."""
    import torch
    import torch.distributed as dist

    from counterflow.launcher.bootstrap import bootstrap

    with bootstrap(worker, device="cpu") as process:
        total = torch.tensor([float(process.rank + 1)])
        dist.all_reduce(total)
        print(f"rank {process.rank} of {process.world_size} sees the sum {total.item()}")
        for _ in range(3):
            dist.all_reduce(total)
        misbehave(mode, worker)
        while mode != "agree":
            dist.all_reduce(total)
        dist.barrier()


def main(mode: str, logs: Path, collective: bool) -> None:
    worker = read_environment(os.environ)
    if mode == "break" and worker.rank == 1:
        raise ImportError("before it is supervised")
    with supervised(worker):
        if mode == "early":
            misbehave("raise", worker)
            time.sleep(FOREVER)
        with open_log(logs, worker.rank, worker.world_size):
            logging.getLogger("counterflow.test").info("logged by %d", worker.rank)
            print(f"printed by {worker.rank}")
            os.write(2, f"from C++ on {worker.rank}\n".encode())
            if collective:
                reduce_until(mode, worker)
                return
            threads = os.environ["OMP_NUM_THREADS"]
            (logs / f"here-{worker.rank}").write_text(json.dumps({"pid": os.getpid(), "threads": threads}))
            misbehave(mode, worker)
            if mode != "agree":
                time.sleep(FOREVER)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), collective="collective" in sys.argv)
