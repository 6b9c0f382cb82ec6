"""Time that the host needs for a pair of 4 MoE layers: Python, dispatch and autograd, without the kernels of a GPU.

    python benchmarks/host.py [--against FOLDER] [--rounds 9] [--device cpu] [--precision bf16] [--functions 25]

The middle rank of a DualPipeV pipeline runs training steps: the real executor, its overlap, the tape, the optimizer's
sums of gradients. The forward of one micro-batch and the backward and weight gradients of another, 4 layers each,
advance in turn. A pair's time is what the executor measures around it, on the clock of this process's own processor
time, with one thread. The neighbours are replaced by ready tensors, so nothing waits.

On the meta device the GPU's branch of the code runs and no kernel. Torch works out the shapes of many operations there
in Python. So a step's operations are also run by themselves from a list, that time is taken off, and each operation is
given the time of a plain one, a product of two numbers. With `--device cpu` the CPU's branch runs, kernels included, at
widths so small that they take little. A GPU adds the launches (2 to 5 us each, more for Triton's), and wakes a thread
for every hand-over to autograd.

With --against the same worker also runs the package in FOLDER, another checkout: both in turn, a step with a dozen
pairs a round. Printed are the parts of a round's fastest pair, medians over the rounds, and the ratio with its range.

Parts: *dispatch* (or *kernels and dispatch*), see above; *hand-overs*, the calls of `torch.autograd.backward` times the
time of a call on a graph of one node; *Python and autograd's nodes*, the rest.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, TOKENS, MICROBATCHES = 4, 16, 12
SETTINGS = (
    f"model.num_hidden_layers={4 * LAYERS}",
    "model.first_k_dense_replace=0",
    "model.num_nextn_predict_layers=0",
    "parallel.pp=2",
    "parallel.schedule=dualpipev",
    f"batch.sequence_length={TOKENS}",
    f"batch.global_sequences={MICROBATCHES}",
    "memory.recompute=v3",
)


CLOCK = time.process_time
"""Time in which this process runs, without the time in which others have its core."""
PAIRS = 2 * MICROBATCHES
"""Forwards with their backwards in a step: pairs, or halves of one, of two stages."""


class Clock:
    """Clock for the executor's spans."""

    perf_counter = CLOCK


class Neighbours:
    """Channels to pipeline ranks that have always just sent, and receive at once."""

    def __init__(self) -> None:
        self._ready: dict[tuple[Any, ...], torch.Tensor] = {}

    def send(self, tensor: torch.Tensor, target: int) -> Neighbours._Transit:
        return self._Transit(tensor)

    def receive(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: int) -> Neighbours._Transit:
        key = (shape, dtype, device)
        if key not in self._ready:
            self._ready[key] = torch.randn(shape, device="cpu").to(dtype).to(device) * 1e-2
        return self._Transit(self._ready[key])

    class _Transit:
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor

        def wait(self) -> torch.Tensor:
            return self._tensor


class Recorded(TorchDispatchMode):
    """Operations that ran, with their arguments, to run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Rank:
    """The middle rank of a pipeline of two ranks and four stages, and its steps."""

    def __init__(self, precision: str, device: str, settings: list[str]) -> None:
        from counterflow.configs.load import load_config
        from counterflow.model.transformer import LossWeights, MicroBatch
        from counterflow.parallel.executor import Program, microbatches_of
        from counterflow.parallel.layout import Layout
        from counterflow.plan.pipeline import make_schedule
        from counterflow.training import build

        config = load_config("tiny", [*SETTINGS, f"precision.recipe={precision}", *settings])
        groups = build.make_groups(config, Layout.resolve(2, 2, 1, 1, 2), "cpu")
        self.device = torch.device(device)
        with ExitStack() as replaced:
            if self.device.type == "meta":
                replaced.enter_context(
                    mock.patch.object(build, "initial_tensor", lambda name, shape, *_: torch.empty(shape))
                )
            self.model = build.build_model(config, groups, self.device)
            self.optimizer = build.build_optimizer(config, self.model, groups)
        self.executor = build.build_executor(config, self.model, groups, self.device)
        self.executor.channels = Neighbours()  # type: ignore[assignment]
        schedule = make_schedule(config, MICROBATCHES)
        self.program = Program.of(schedule, 1)
        self.expected = self.model.accumulations(microbatches_of(schedule, 1))
        tokens = torch.zeros(1, TOKENS + 1, dtype=torch.int64, device=self.device)
        valid = torch.ones(1, dtype=torch.bool, device=self.device)
        self.batches = [MicroBatch(tokens, valid, LossWeights(1e-3, 1e-3, 1e-3)) for _ in range(MICROBATCHES)]

        self.recorded: list[tuple[Callable[..., Any], Any, Any]] = []

    def step(self) -> list[float]:
        """Run a step; returns the milliseconds of each pair whose backward has its W inside."""
        self.optimizer.begin_step(self.expected)
        from counterflow.parallel import executor

        with mock.patch.object(executor, "time", Clock):
            spans = self.executor.train(self.program, self.batches).spans
        return [(end - start) * 1e3 for action, start, end in spans if _is_whole_pair(action)]

    def round(self) -> dict[str, float]:
        """Run a step, and its operations again; returns the milliseconds of a pair, and of a pair's operations."""
        pairs = self.step()
        with torch.no_grad():
            operations = min(self._again() for _ in range(3))
        return {"pair": min(pairs), "operations": operations * 1e3 / PAIRS, "plain": plain_dispatch()}

    def _again(self) -> float:
        start = CLOCK()
        for function, args, kwargs in self.recorded:
            function(*args, **kwargs)
        return CLOCK() - start

    def record(self) -> None:
        """Keep the operations of a step for `round`."""
        with Recorded() as recorded:
            self.step()
        self.recorded = recorded.calls


def _is_whole_pair(action: Any) -> bool:
    return hasattr(action, "backward") and action.backward.kind == "B"


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """Context that counts the calls of a function."""
    calls, plain = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(*args, **kwargs)

    with mock.patch.object(owner, name, counting):
        yield calls


def shares(rank: Rank) -> dict[str, float]:
    """Operations and hand-overs of a pair, and the milliseconds of the hand-overs by themselves."""
    from counterflow import phases

    # Checkouts differ in what they call.
    places = ((torch.autograd, "backward"), (phases, "run_backward"))
    with ExitStack() as stack:
        counts = [stack.enter_context(counted(*place)) for place in places if hasattr(*place)]
        rank.step()
    hand_overs = sum(count[0] for count in counts)
    x, each = torch.zeros((), requires_grad=True), 2000
    one = torch.ones_like(x)
    roots = [x.view_as(x) for _ in range(each)]
    start = CLOCK()
    for root in roots:
        torch.autograd.backward(root, one)
    hand_over = (CLOCK() - start) / each * 1e3
    return {
        "operations": len(rank.recorded) / PAIRS,
        "hand_overs": hand_overs / PAIRS,
        "hand_overs_ms": hand_overs / PAIRS * hand_over,
    }


def plain_dispatch() -> float:
    """Microseconds of an operation on one element, called as the replay calls operations."""
    function, x, each = torch.ops.aten.mul.Tensor, torch.zeros(1), 2000
    best = 1e9
    with torch.no_grad():
        for _ in range(5):
            start = CLOCK()
            for _ in range(each):
                function(x, x)
            best = min(best, CLOCK() - start)
    return best / each * 1e6


def work(args: argparse.Namespace) -> None:
    """Serve the rounds that come in on stdin, one word a line: a step's times, the shares, or a profile."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from on_meta import cheapen, on_meta  # this program's, whichever checkout the worker runs
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    from counterflow.parallel.optimizer import sharded

    replaced = ExitStack()
    replaced.enter_context(mock.patch.object(sharded, "check_agreement"))  # there is no peer to ask
    if args.device == "meta":
        replaced.enter_context(on_meta(TOKENS * 2 // 8))
    with replaced:
        serve(args, cheapen)


def serve(args: argparse.Namespace, cheapen: Callable[..., Any]) -> None:
    """Answer the questions on stdin. Garbage is collected as a training run of the checkout collects it."""
    try:
        from counterflow.training.garbage import collecting_every
    except ImportError:  # by Python itself
        answer_all(args, cheapen)
        return
    with collecting_every(100):
        answer_all(args, cheapen)


def answer_all(args: argparse.Namespace, cheapen: Callable[..., Any]) -> None:
    """Answer the questions on stdin until it ends."""
    rank = Rank(args.precision, args.device, args.set)
    rank.record()
    libraries = cheapen({function for function, _, _ in rank.recorded}) if args.device == "meta" else []
    answers: dict[str, Callable[[], Any]] = {"round": rank.round, "shares": lambda: shares(rank)}
    for line in sys.stdin:
        if line.strip() == "profile":
            answer: Any = profiled(rank, args.functions)
        else:
            answer = answers[line.strip()]()
        print(json.dumps(answer), flush=True)
    del libraries


def profiled(rank: Rank, functions: int) -> str:
    """Table of the functions in which the host spends its own time, over two steps, all figures a layer of a pair."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(2):
        rank.step()
    profile.disable()
    stats: Any = pstats.Stats(profile)
    pairs = 2 * 2 * MICROBATCHES * LAYERS
    total = sum(row[2] for row in stats.stats.values())
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:functions]
    lines = [f"{'us a layer':>11}{'share':>7}{'calls':>8}{'with callees':>14}"]
    for (file, line, name), (_, calls, own, whole, _) in rows:
        where = f"{name} {'/'.join(Path(file).parts[-2:])}:{line}" if line else name
        lines.append(
            f"{own / pairs * 1e6:>11.1f}{own / total:>7.1%}{calls / pairs:>8.1f}{whole / pairs * 1e6:>14.1f}  {where}"
        )
    return "\n".join(lines)


class Worker:
    """This program in a process of its own, with the package of a checkout."""

    def __init__(self, checkout: Path, folder: Path, arguments: list[str]) -> None:
        folder.mkdir()
        (folder / "counterflow").symlink_to(checkout.resolve())
        (folder / "on_meta.py").symlink_to(Path(__file__).with_name("on_meta.py").resolve())
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, "--worker", *arguments]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def report(name: str, rounds: list[dict[str, float]], part: dict[str, float], plain: float | None) -> list[float]:
    """Print the parts of a pair's time; returns the pair's time by rounds. With `plain`, microseconds, every operation
    takes so long."""
    by_round = [each["operations"] if plain is None else part["operations"] * plain * 1e-3 for each in rounds]
    pairs = [each["pair"] - each["operations"] + own for each, own in zip(rounds, by_round, strict=True)]
    pair, operations = statistics.median(pairs), statistics.median(by_round)
    python = pair - operations - part["hand_overs_ms"]
    print(
        f"{name}: {pair:.1f} ms a pair, {pair / LAYERS:.2f} ms a layer, "
        f"{part['operations'] / LAYERS:.0f} operations and "
        f"{part['hand_overs'] / LAYERS:.1f} calls of autograd a layer\n"
        f"    {'kernels and dispatch' if plain is None else 'dispatch'} {operations:.1f} ms ({operations / pair:.0%}), "
        f"hand-overs {part['hand_overs_ms']:.1f} ms ({part['hand_overs_ms'] / pair:.0%}), "
        f"Python and autograd's nodes {python:.1f} ms ({python / pair:.0%})"
    )
    if plain is not None:
        took = statistics.median(each["operations"] for each in rounds)
        print(f"    operations at {plain:.2f} us each; on the meta device they took {took:.1f} ms")
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="folder of another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--device", default="meta", choices=["meta", "cpu"])
    parser.add_argument("--functions", type=int, default=0, help="print a profile with so many functions")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train; may be repeated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    arguments = ["--precision", args.precision, "--device", args.device, "--functions", str(args.functions)]
    arguments += [word for setting in args.set for word in ("--set", setting)]
    sides = {"this tree": Path(__file__).parents[1]}
    if args.against is not None:
        sides[str(args.against)] = args.against
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            name: Worker(checkout, Path(folder) / str(number), arguments)
            for number, (name, checkout) in enumerate(sides.items())
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for turn in range(args.rounds + 1):
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                answer = workers[name].ask("round")
                if turn:  # the first round warms up
                    times[name].append(answer)
        every = [each["plain"] for rounds in times.values() for each in rounds]
        plain = statistics.median(every) if args.device == "meta" else None
        pairs = [report(name, times[name], worker.ask("shares"), plain) for name, worker in workers.items()]
        if args.against is not None:
            ratios = [ours / theirs for ours, theirs in zip(*pairs, strict=True)]
            print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        if args.functions:
            print(workers["this tree"].ask("profile"))
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
