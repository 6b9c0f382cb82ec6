"""The proof of the GPU's path: everything about one GPU that can only be seen on one, in one command.

    make prove-gpu PYTHON=python3            on a machine with a GPU: under 8 minutes, no network, no environment
    make prove-gpu REHEARSE=1                on a CPU at toy sizes: the same script, so that it works when the GPU comes

Every part has a process and a time limit of its own. Its results are in `OUT/PART.json` as soon as they are known, its
output in `OUT/PART.log`, and one page of all of them in `OUT/index.md`. Nothing stops at a failure. Parts come by their
worth a second: what is cut off costs least. To record a run, move the folder to `docs/proofs/DATE-GPU`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from counterflow.tests.gpu.prove import (
    attention,
    environment,
    fp8,
    fp8_kernels,
    grouped,
    host,
    kernels,
    memory,
    overlap,
    ranks,
    throughput,
    trace,
    training,
    waits,
)
from counterflow.tests.gpu.prove.driver import Part, run_all
from counterflow.tests.gpu.prove.tools import Setup

PARTS = (
    Part("environment", "versions, the GPU, its speeds", 40, environment.run),
    Part("grouped", "products grouped by expert, with empty experts", 40, grouped.run),
    Part("attention", "attention's kernels at widths 192 and 128", 50, attention.run),
    Part("training", "losses and gradients against the CPU's", 90, training.run),
    Part("kernels", "fused kernels against their formulas", 80, kernels.run),
    Part("waits", "waits of the host in a step", 40, waits.run),
    Part("host", "host time and launches against the GPU's time", 80, host.run),
    Part("ranks", "ranks that share the GPU against one process", 100, ranks.run),
    Part("memory", "the dry run's memory against the allocator's", 80, memory.run),
    Part("throughput", "MFU of a slice of V3's layers", 90, throughput.run),
    Part("fp8_kernels", "kernels that quantise", 90, fp8_kernels.run),
    Part("fp8", "FP8 products: torch's, Transformer Engine's, emulated", 50, fp8.run),
    Part("overlap", "communication that an overlapped pair exposes", 60, overlap.run),
    Part("trace", "20 steps with a trace of the profiler", 40, trace.run),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prove"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU at toy sizes")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all parts together")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(1)
    setup = Setup(args.out.resolve(), args.rehearse)
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    passed = run_all(parts, setup, args.seconds)
    print(f"results: {args.out / 'index.md'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
