"""Ranks that share the GPU: pipeline and expert parallelism against one process, over gloo, and NCCL where it can."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from counterflow.configs.load import load_config
from counterflow.launcher import bootstrap
from counterflow.launcher.bootstrap import Backend
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, trainer

LAYOUTS = {
    "DualPipe 2 x ep 2": (4, ("parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2")),
    "DualPipeV 2": (2, ("parallel.pp=2", "parallel.schedule=dualpipev")),
    "ep 2 x edp 2, two hops": (4, ("parallel.ep=2", "parallel.gpus_per_node=1", "comm.dispatcher=two-hop")),
}
COMMON = ("precision.recipe=fp32", "run.seed=2", "model.initializer_range=0.05", "model.num_hidden_layers=4")


def run(setup: Setup, report: Report) -> None:
    alone = together(setup, 1, "gloo", train, COMMON, setup.pick(5, 1))[0]
    layouts = setup.pick(list(LAYOUTS), ["DualPipe 2 x ep 2"])
    for name in layouts:
        world, settings = LAYOUTS[name]
        with report.attempt(f"{name}, gloo"):
            started = time.perf_counter()
            made = together(setup, world, "gloo", train, (*COMMON, *settings), setup.pick(5, 1))
            _compare(report, f"{name}, gloo", made, alone)
            report.number(f"{name}, gloo: seconds with start", time.perf_counter() - started)
    if setup.rehearse:
        return
    with report.attempt("collectives of NCCL on one rank"):
        for line in together(setup, 1, "nccl", collectives)[0]:
            report.row("NCCL on one rank", **line)
    version = torch.cuda.nccl.version()
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"  # read by 2.30 and newer
    try:
        made = together(setup, 2, "nccl", train, (*COMMON, *LAYOUTS["DualPipeV 2"][1]), 5, seconds=60)
    except RuntimeError as refusal:
        report.number(f"NCCL {version}: two ranks on one GPU", f"refused: {refusal}"[:300])
    else:
        _compare(report, "DualPipeV 2, NCCL", made, alone)


def _compare(report: Report, name: str, made: list[Any], alone: Any) -> None:
    off = max(abs(a - b) / abs(b) for ranks in made for a, b in zip(ranks, alone, strict=True))
    report.check(f"{name}: losses and norms are one process's", off < 1e-4, off)


def train(settings: tuple[str, ...], steps: int, setup: Setup) -> list[float]:
    """Losses and norms of gradients of a few steps on this rank."""
    config = load_config("tiny", settings)
    of = trainer(config, setup.device, dist.get_world_size())
    numbers: list[float] = []
    for _ in range(steps):
        metrics = of.step()
        numbers += [metrics.loss, metrics.grad_norm]
    of.close()
    return numbers


def collectives(setup: Setup) -> list[dict[str, Any]]:
    """Every collective and format that a run uses, in a group of one, with the tensor dropped before the wait."""
    rows = []
    for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2**20, dtype=dtype, device=setup.device)
        out = torch.empty_like(x)
        calls: dict[str, Callable[[], Any]] = {
            "all_to_all": lambda x=x, out=out: dist.all_to_all_single(out, x.clone(), async_op=True),
            "all_gather": lambda x=x, out=out: dist.all_gather_into_tensor(out, x.clone(), async_op=True),
        }
        if dtype.is_floating_point:
            calls["reduce_scatter"] = lambda x=x, out=out: dist.reduce_scatter_tensor(out, x.clone(), async_op=True)
        for name, call in calls.items():
            out.zero_()
            call().wait()
            rows.append({"collective": name, "format": str(dtype), "right": bool((out == x).all())})
    return rows


def together(
    setup: Setup, world: int, backend: Backend, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0
) -> list[Any]:
    """Results of `function(*arguments, setup)` on `world` ranks of one group, in their order.

    Raises RuntimeError with a rank's own error, or where ranks take more than `seconds`.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, ranks = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(there, setup, rank, world, port, backend, function, arguments))
        process.start()
        there.close()
        pipes.append(here)
        ranks.append(process)
    end = time.monotonic() + seconds
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise RuntimeError(f"rank {rank} gave no result within {seconds:g} s")
            try:
                error, result = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            results.append(result)
        return results
    finally:
        for process in ranks:
            process.join(2)
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()


def _serve(
    pipe: Any, setup: Setup, rank: int, world: int, port: int, backend: Backend, function: Any, arguments: Any
) -> None:
    try:
        # Two ranks of NCCL on one GPU: a run refuses what this tries.
        with mock.patch.object(bootstrap, "refuse_shared_gpu"), setup.rank(rank, world, port, backend):
            pipe.send((None, function(*arguments, setup)))
    except BaseException as error:
        print(traceback.format_exc(), flush=True)
        pipe.send((f"{type(error).__name__}: {error}", None))
    finally:
        pipe.close()
        os._exit(0)
