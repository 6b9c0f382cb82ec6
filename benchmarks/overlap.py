"""Communication that an overlapped pair exposes, on a real network between two processes.

    sudo .venv/bin/python -P benchmarks/overlap.py [--rounds 9] [--ratios 0.5 1.0] [--order …] [--matmul] [--two-hop]

Two processes in two network namespaces, joined by a link of limited rate, hold a chunk of 4 MoE layers with EP 2 and
run the forward of one micro-batch with the backward of another, as the pipeline does. Every all-to-all moves real
tensors over the link. Computation is emulated by waiting, as a GPU leaves its host free: the project's own blocks run
at small widths, and each of their parts (attention, shared expert, routed experts; forward, backward for input,
backward for weights) also waits for its share of the time in DeepSeek's published trace. With --matmul the parts
multiply matrices instead, on the cores that also move the packets. With --two-hop tokens travel by the two-hop
dispatcher, with an FP8 wire; the processes are nodes of one rank, so the second hop sends nothing but has to be
launched.

    exposed = (T_pair - T_compute) / T_communication,    T_communication = T_blocking - T_compute

T_compute is the same chunk with all experts on each rank, so that no row travels; T_blocking waits for every transfer
where it is launched. All sides run in turn, every round. A time is the slower rank's, the median of the rounds; the
spread is over the shares of single rounds. Compute is scaled so that the transfers alone take the wanted ratio of it.
Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.benchmarks.namespaces import bytes_sent, joined, run_at_both_ends
from counterflow.comm import flat
from counterflow.comm import two_hop as two_hops
from counterflow.comm.exchange import Exchange
from counterflow.comm.hops import InFlight
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.wire import FP8Wire
from counterflow.model.config import ModelConfig
from counterflow.model.naming import initialise
from counterflow.model.router import Router
from counterflow.model.transformer import LossWeights, MicroBatch, Part, Transformer
from counterflow.parallel.overlap import run_pair
from counterflow.parallel.overlap_orders import find_order
from counterflow.phases import Tape, run
from counterflow.settings import UsageError
from counterflow.weight_gradients import WeightQueue, drain

LAYERS, TOKENS, EXPERTS, TOP_K = 4, 256, 4, 2
# Rows wide enough for a transfer of 0.5 MiB, all other widths minimal.
WIDTHS = {
    "hidden_size": 512,
    "moe_intermediate_size": 8,
    "num_attention_heads": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 2,
    "v_head_dim": 8,
}
# Milliseconds per layer on an H800: forward, backward for input, backward for weights, and the weights' GEMMs. Kernel
# time in DeepSeek's published training trace by the annotation that launched it (a quarter of the sum over four
# layers); mlp is divided between shared and routed experts by the time of their GEMMs.
TRACE = {"attention": (4.1, 8.8, 2.4, 5), "shared": (0.5, 0.55, 0.7, 2), "experts": (4.1, 4.75, 5.7, 2)}
ALTERNATION = [
    "F.attention",
    "B.finish",
    "F.dispatch",
    "B.combine",
    "F.shared",
    "B.experts",
    "F.experts",
    "B.shared",
    "F.combine",
    "B.dispatch",
    "F.finish",
    "B.attention",
]


class Work:
    """Computation of a given number of seconds: waiting, or matmuls that take so long when undisturbed."""

    def __init__(self, matmul: bool) -> None:
        self.scale = 0.0
        """Seconds per millisecond of the trace."""
        self._operand = torch.randn(192, 192) if matmul else None
        self._each = min(self._time(50) for _ in range(20)) / 50 if matmul else 0.0

    def __call__(self, share: float) -> None:
        seconds = share * self.scale
        if self._operand is None:
            time.sleep(seconds)
        else:
            self._multiply(round(seconds / self._each))

    @torch.no_grad()
    def _multiply(self, times: int) -> None:
        assert self._operand is not None
        for _ in range(times):
            torch.mm(self._operand, self._operand)

    def _time(self, times: int) -> float:
        start = time.perf_counter()
        self._multiply(times)
        return time.perf_counter() - start


class Paced(nn.Module):
    """A module with the time of a part of DeepSeek's layer, in the forward and both halves of the backward."""

    def __init__(self, module: nn.Module, work: Work, part: str, queue: WeightQueue) -> None:
        super().__init__()
        self.module = module
        self.pace = work, TRACE[part], queue

    def forward(self, *given: Any) -> Tensor:
        result: Tensor = _PaceFunction.apply(self.module(*given), *self.pace)
        return result


class _PaceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Work, shares: tuple[float, ...], queue: WeightQueue) -> Tensor:
        ctx.pace = work, shares, queue
        work(shares[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        work, (_, for_input, for_weights, gemms), queue = ctx.pace
        work(for_input)
        for _ in range(int(gemms)):
            piece = partial(work, for_weights / gemms)
            queue.put(piece) if queue.deferring else piece()
        return grads[0], None, None, None


class EvenRouter(Router):
    """Router that sends the same number of tokens to every expert, and half of each rank's rows to the other rank."""

    def select(self, scores: Tensor) -> Tensor:
        first, step = torch.arange(scores.shape[0]).unsqueeze(1), EXPERTS // TOP_K
        return (first + torch.arange(TOP_K) * step) % EXPERTS


def make_chunk(work: Work, group: dist.ProcessGroup | None, in_flight: InFlight, two_hop: bool) -> Transformer:
    """Make four paced MoE layers from the middle of a model; without a group all experts are local."""
    dispatcher: RoutedDispatcher = flat.FlatDispatcher(group, EXPERTS)
    if two_hop:
        nodes = range(1 if group is None else group.size())
        dispatcher = two_hops.TwoHopDispatcher(
            group, EXPERTS, DispatchOptions(wire=FP8Wire(), in_flight=in_flight), nodes
        )
    config = ModelConfig(
        **WIDTHS,
        vocab_size=2,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=0,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    local = range(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    chunk = Transformer(config, dispatcher, local, part=Part(range(LAYERS), first=False, last=False))
    initialise(chunk, seed=0)
    for block in chunk.layers.values():
        gate = EvenRouter(config)
        gate.load_state_dict(block.mlp.gate.state_dict())
        block.mlp.gate = gate
        block.attention = Paced(block.attention, work, "attention", chunk.weight_queue)
        block.mlp.shared = Paced(block.mlp.shared, work, "shared", chunk.weight_queue)
        block.mlp.experts = Paced(block.mlp.experts, work, "experts", chunk.weight_queue)
    return chunk


class Pairs:
    """A chunk and the micro-batch whose backward is next: the forward of one pair is the backward of the following."""

    def __init__(self, work: Work, group: dist.ProcessGroup | None, two_hop: bool) -> None:
        self.in_flight = InFlight()
        self.chunk = make_chunk(work, group, self.in_flight, two_hop)
        tokens, valid = torch.zeros(1, TOKENS + 1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
        self.batch = MicroBatch(tokens, valid, LossWeights(balance=0.0))
        self.x = torch.randn(1, TOKENS, WIDTHS["hidden_size"])
        self._tape = Tape()
        run(self._forward())

    def _forward(self) -> Any:
        return self.chunk.phases(self.batch, self._tape.enter(self.x), self._tape)

    def run(self, order: Sequence[str], defer: bool = True) -> None:
        """Run an overlapped pair; without `defer` weight gradients are computed within the backward."""
        tape, self._tape = self._tape, Tape()
        deferred: deque[Callable[[], None]] = deque()
        backward = tape.backward(self.x, self.chunk.weight_queue, deferred if defer else None)
        run_pair(self._forward(), backward, deferred, order, self.in_flight.boundary)
        drain(deferred)


@dataclass
class Tally:
    """Bytes of the tensors' rows that went to the other rank."""

    sent: int = 0


@contextmanager
def exchanges(tally: Tally, blocking: bool = False) -> Iterator[None]:
    """Context in which every all-to-all counts its bytes and, if `blocking`, is waited for where it is launched."""

    class Watched(Exchange):
        def __init__(
            self, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None, *counted: Any
        ) -> None:
            super().__init__(rows, send, receive, group, *counted)
            if group is not None:
                away = sum(send) - send[group.rank()]
                tally.sent += away * rows[:1].numel() * rows.element_size()
            if blocking:
                self.wait()

    with mock.patch.object(flat, "Exchange", Watched), mock.patch.object(two_hops, "Exchange", Watched):
        yield


class Sides:
    """Timed runs, by name."""

    def __init__(self, work: Work, group: dist.ProcessGroup, orders: dict[str, tuple[str, ...]], two_hop: bool) -> None:
        self.group, self.work = group, work
        self.local, self.distributed = Pairs(work, None, two_hop), Pairs(work, group, two_hop)
        half = TOKENS * TOP_K // 2
        self.rows, self.splits = torch.randn(2 * half, WIDTHS["hidden_size"]), [half, half]
        self.steps: dict[str, tuple[Callable[[], None], bool]] = {
            "compute": (lambda: self.local.run(find_order("v3")), False),
            "transfers": (self.transfers, False),
            "blocking": (lambda: self.distributed.run(()), True),
            "sequence": (lambda: self.distributed.run(()), False),
            "alternation": (lambda: self.distributed.run(ALTERNATION, defer=False), False),
        }
        for name, order in orders.items():
            self.steps[name] = partial(self.distributed.run, order), False

    def transfers(self) -> None:
        """Run the dispatches and combines of the pair alone: two of each in every layer."""
        for _ in range(4 * LAYERS):
            Exchange(self.rows, self.splits, self.splits, self.group).wait()

    def run(self, name: str) -> tuple[float, int, int]:
        """Time of the slower rank in seconds; bytes that this rank's tensors and its kernel sent."""
        step, blocking = self.steps[name]
        tally = Tally()
        dist.barrier(self.group)
        kernel = bytes_sent()
        with exchanges(tally, blocking):
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
        self.distributed.chunk.zero_grad()
        self.local.chunk.zero_grad()
        kernel = bytes_sent() - kernel
        slower = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slower, dist.ReduceOp.MAX, group=self.group)
        return float(slower), tally.sent, kernel


@dataclass
class Measured:
    """Results of the rounds at one ratio, by side."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    tensors: dict[str, list[int]] = field(default_factory=dict)
    kernel: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, tensors: int, kernel: int) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.tensors.setdefault(name, []).append(tensors)
        self.kernel.setdefault(name, []).append(kernel)

    def exposed(self, name: str) -> list[float]:
        """Share of the communication that was exposed, round by round."""
        times = (self.seconds[side] for side in (name, "compute", "blocking"))
        return [(pair - compute) / (blocking - compute) for pair, compute, blocking in zip(*times, strict=True)]


def measure(sides: Sides, ratio: float, rounds: int) -> Measured:
    """Run all sides in turn, every round, with transfers that take `ratio` of the compute."""

    def seconds(name: str) -> float:
        return statistics.median(sides.run(name)[0] for _ in range(5))

    sides.work.scale, transfers = 0.0, seconds("transfers")
    for _ in range(2):  # the blocks' own computation takes longer between waits, which empty the caches
        missing = transfers / ratio - seconds("compute")
        sides.work.scale += missing / (LAYERS * sum(sum(part[:3]) for part in TRACE.values()))
        assert sides.work.scale > 0, f"the blocks by themselves compute for longer than {transfers / ratio:.3f} s"
    measured, names = Measured(), list(sides.steps)
    for turn in range(rounds + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            result = sides.run(name)
            if turn:  # the first round warms up
                measured.add(name, *result)
    return measured


def report(ratio: float, measured: Measured, mbit: float) -> None:
    seconds = {name: statistics.median(times) for name, times in measured.seconds.items()}
    communication = seconds["blocking"] - seconds["compute"]
    sent = statistics.median(measured.tensors["blocking"])
    rate = statistics.median(measured.kernel["transfers"]) * 8 / seconds["transfers"] / 1e6
    print(
        f"\nratio {ratio:g}: compute {seconds['compute'] * 1e3:.0f} ms, communication {communication * 1e3:.0f} ms, "
        f"so {communication / seconds['compute']:.2f}; the transfers alone {seconds['transfers'] * 1e3:.0f} ms, "
        f"{rate:.1f} of {mbit:g} Mbit/s"
    )
    print(f"{'pair':<14}{'ms':>7}{'exposed':>9}   {'rounds':<15}{'kernel bytes / tensor bytes, each rank':>40}")
    for name in list(seconds)[2:]:
        exposed = (seconds[name] - seconds["compute"]) / communication
        shares = measured.exposed(name)
        kernel = statistics.median(measured.kernel[name])
        print(
            f"{name:<14}{seconds[name] * 1e3:>7.0f}{exposed:>9.1%}   "
            f"{f'{min(shares):.1%} to {max(shares):.1%}':<15}{kernel:>16.0f} / {sent:.0f} = {kernel / sent:.3f}",
            flush=True,
        )


def serve(args: argparse.Namespace) -> None:
    """Run as one of the two processes, already inside its namespace."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not args.matmul:
        os.nice(-10)  # so that other programs do not delay a process that has waited
    store = dist.TCPStore(args.address, 29500, 2, is_master=args.rank == 0)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=2)
    work = Work(args.matmul)
    assert dist.group.WORLD is not None
    orders = {order: find_order(_named(order)) for order in args.order}
    sides = Sides(work, dist.group.WORLD, orders, args.two_hop)
    for ratio in args.ratios:
        measured = measure(sides, ratio, args.rounds)
        if args.rank == 0:
            report(ratio, measured, args.mbit)
    dist.barrier()
    dist.destroy_process_group()


def _named(order: str) -> str | list[str]:
    return order.split(",") if "." in order else order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0], help="communication over compute")
    parser.add_argument("--mbit", type=float, default=50.0, help="rate of the link in each direction, Mbit/s")
    parser.add_argument(
        "--order",
        action="append",
        help="v3 (the default), or phases separated by commas, as parallel.overlap_order takes them; may be repeated",
    )
    parser.add_argument("--matmul", action="store_true", help="multiply matrices instead of waiting")
    parser.add_argument("--two-hop", action="store_true", help="the two-hop dispatcher with an FP8 wire")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.order = args.order or ["v3"]
    try:
        if args.rank is not None:
            serve(args)
            return
        for order in args.order:
            find_order(_named(order))
        with joined(args.mbit) as link:
            run_at_both_ends(link, [*sys.argv, "--address", link.addresses[0]])
    except UsageError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
