"""Comparison of dispatchers: bytes over each kind of link, and time.

    .venv/bin/python -P benchmarks/comm.py --nodes 8 --ranks 2 --tokens 8 --hidden 7168 --experts 256 --limit 4
    sudo .venv/bin/python -P benchmarks/comm.py --mbit 200 --train

A side is a dispatcher and a wire, such as two-hop-fp8. A step of the layer is dispatch and combine, forward and
backward, of the same tokens with almost no computation in between. With --train a step is a training step of a small
model. Every side runs in every round, in turn. A time is the slowest rank's, the table shows medians, and ratios are to
the first side, round by round.

With --mbit the two nodes are network namespaces joined by a link of that rate, and the kernel's own count of bytes is
printed next to the meter's. Without --mbit all ranks share this machine, and times are the host's work, not a
network's.
Namespaces need root and iproute2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.benchmarks.namespaces import bytes_sent, joined, run_at_both_ends, run_together
from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.meter import Meter, Traffic, numbers_of, traffic_of
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire, PlainWire
from counterflow.configs.config import Config
from counterflow.data.config import DataConfig
from counterflow.data.open import open_data
from counterflow.parallel.layout import Layout
from counterflow.report.text.numbers import format_bytes
from counterflow.settings import UsageError
from counterflow.training.build import make_groups
from counterflow.training.trainer import Trainer

SIDES = ("flat-bf16", "flat-fp8", "two-hop-bf16", "two-hop-fp8")
TO_EXPERTS, TO_TOKENS = ("dispatch", "combine backward"), ("combine", "dispatch backward")


def node_limited(rank: int, args: argparse.Namespace) -> Tensor:
    """Random experts of this rank's tokens, `[T, K]`: from `limit` random groups of experts each."""
    generator = torch.Generator().manual_seed(rank)
    per_group = args.experts // args.groups
    kept = torch.rand(args.tokens, args.groups, generator=generator).topk(args.limit).indices
    scores = torch.rand(args.tokens, args.groups, per_group, generator=generator)
    closed = torch.ones(args.tokens, args.groups, dtype=torch.bool).scatter_(1, kept, False)
    return scores.masked_fill(closed.unsqueeze(-1), -1.0).flatten(1).topk(args.top_k).indices


@dataclass
class Side:
    """Measurements of one side."""

    step: Callable[[], None]
    meter: Meter
    seconds: list[float] = field(default_factory=list)
    kernel: list[int] = field(default_factory=list)
    """Bytes that the first node's kernel sent over the link."""
    metered: list[int] = field(default_factory=list)
    """Bytes that the first node's ranks sent to the other node."""
    traffic: list[Traffic] = field(default_factory=list)


def layer_side(name: str, args: argparse.Namespace, group: dist.ProcessGroup, nodes: Sequence[int]) -> Side:
    """Side of a dispatcher alone."""
    meter = Meter(dict(enumerate(nodes)))
    dispatcher = make_dispatcher(name, args.experts, group, nodes, meter)
    x = torch.randn(args.tokens, args.hidden, generator=torch.Generator().manual_seed(7)).bfloat16().requires_grad_()
    ids = node_limited(group.rank(), args)
    weights = torch.rand(args.tokens, args.top_k).requires_grad_()
    gradient = torch.ones(args.tokens, args.hidden, dtype=torch.bfloat16)

    def step() -> None:
        dispatched = dispatcher.dispatch(x, ids, weights)
        dispatcher.combine(dispatched.x * dispatched.weights[:, None].bfloat16(), dispatched).backward(gradient)
        x.grad = weights.grad = None

    return Side(step, meter)


def make_dispatcher(
    name: str, experts: int, group: dist.ProcessGroup, nodes: Sequence[int], meter: Meter
) -> RoutedDispatcher:
    dispatcher, _, wire = name.rpartition("-")
    options = DispatchOptions(wire=FP8Wire() if wire == "fp8" else PlainWire(), meter=meter)
    if dispatcher == "flat":
        return FlatDispatcher(group, experts, options)
    return TwoHopDispatcher(group, experts, options, nodes)


def training_side(name: str, args: argparse.Namespace, size: int, folder: Path) -> Side:
    """Side of training steps of a small model, in BF16, with experts on all ranks."""
    dispatcher, _, wire = name.rpartition("-")
    config = Config.model_validate(
        {
            "model": {
                "vocab_size": 320,
                "hidden_size": args.hidden,
                "intermediate_size": 2 * args.hidden,
                "moe_intermediate_size": 32,
                "num_hidden_layers": args.layers,
                "first_k_dense_replace": 0,
                "num_attention_heads": 4,
                "q_lora_rank": 64,
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
                "n_routed_experts": args.experts,
                "num_experts_per_tok": args.top_k,
                "n_group": args.groups,
                "topk_group": args.limit,
                "num_nextn_predict_layers": 0,
                "max_position_embeddings": args.tokens,
            },
            "batch": {"sequence_length": args.tokens, "global_sequences": size, "micro_sequences": 1},
            "parallel": {"ep": size, "gpus_per_node": args.ranks},
            "comm": {"dispatcher": dispatcher, "wire": wire},
            "train": {"steps": 1000, "device": "cpu"},
        }
    )
    groups = make_groups(config, Layout(size, ep=size, gpus_per_node=args.ranks), "cpu")
    data = open_data(DataConfig(), args.tokens, 1, config.run.seed, folder)
    trainer = Trainer(config, groups, torch.device("cpu"), data)
    return Side(lambda: _train(trainer), Meter({}))


def _train(trainer: Trainer) -> None:
    trainer.step()


def measure(sides: dict[str, Side], args: argparse.Namespace, group: dist.ProcessGroup) -> None:
    """Run all sides in turn, in every round; the first round warms up."""
    names = list(sides)
    for number in range(args.rounds + 1):
        for name in names[:: 1 if number % 2 else -1]:
            side = sides[name]
            side.meter.take()
            dist.barrier(group)
            kernel = bytes_sent() if args.mbit else 0
            start = time.perf_counter()
            side.step()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.barrier(group)
            kernel = bytes_sent() - kernel if args.mbit else 0
            dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
            traffic = side.meter.take()
            numbers, metered = torch.tensor(numbers_of(traffic)), torch.tensor(0)
            if args.rank < args.ranks:
                metered += sum(tally.bytes for kind, tally in traffic.items() if kind.link == "between")
            dist.all_reduce(numbers, group=group)
            dist.all_reduce(metered, group=group)
            if number:
                side.metered.append(int(metered))
                side.seconds.append(float(seconds))
                side.kernel.append(kernel)
                side.traffic.append(traffic_of(numbers.tolist()))


def serve(args: argparse.Namespace) -> None:
    """Run one of the ranks."""
    torch.set_num_threads(1)
    size = args.nodes * args.ranks
    store = dist.TCPStore(args.address, args.port, size, is_master=args.rank == 0)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    nodes = [rank // args.ranks for rank in range(size)]
    with TemporaryDirectory() as folder:
        sides = {
            name: training_side(name, args, size, Path(folder)) if args.train else layer_side(name, args, group, nodes)
            for name in args.sides
        }
        measure(sides, args, group)
    if args.rank == 0:
        report(sides, args)
    dist.barrier()
    dist.destroy_process_group()


def report(sides: dict[str, Side], args: argparse.Namespace) -> None:
    size, first = args.nodes * args.ranks, next(iter(sides.values()))
    where = f"a link of {args.mbit:g} Mbit/s" if args.mbit else "one machine"
    print(
        f"{size} ranks on {args.nodes} nodes ({where}); {args.tokens} tokens a rank, hidden {args.hidden}, "
        f"{args.experts} experts, top-{args.top_k}, {args.limit} of {args.groups} groups\n"
    )
    if not args.train:
        print(
            f"{'between nodes, a token':<16}{'dispatch':>12}{'':>8}{'combine':>12}{'':>8}{'messages':>10}{'within':>12}"
        )
        tokens = size * args.tokens
        base = None
        for name, side in sides.items():
            traffic = side.traffic[-1]
            sent = {
                purposes: _sum(traffic, purposes, "between")
                for purposes in (TO_EXPERTS[:1], TO_TOKENS[:1], TO_EXPERTS + TO_TOKENS)
            }
            base = base or sent
            cells = [
                f"{format_bytes(sent[purposes][0] / tokens):>12}{sent[purposes][0] / max(1, base[purposes][0]):>7.3f}x"
                for purposes in (TO_EXPERTS[:1], TO_TOKENS[:1])
            ]
            within = _sum(traffic, TO_EXPERTS + TO_TOKENS, "within")[0]
            messages = sent[TO_EXPERTS + TO_TOKENS][1]
            print(f"{name:<16}      {''.join(cells)}{messages:>10}{format_bytes(within / tokens):>12}")
        print()
    print(f"{'a step':<16}{'ms':>10}{'ratio':>9}   {'rounds':<18}{'kernel bytes / metered':>30}")
    for name, side in sides.items():
        ratios = [own / base for own, base in zip(side.seconds, first.seconds, strict=True)]
        kernel = ""
        if args.mbit and not args.train:
            sent, metered = statistics.median(side.kernel), statistics.median(side.metered)
            kernel = f"{sent:.0f} / {metered:.0f} = {sent / metered:.3f}"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        ms = statistics.median(side.seconds) * 1e3
        print(f"{name:<16}{ms:>10.1f}{statistics.median(ratios):>8.3f}x   {spread:<18}{kernel:>30}", flush=True)


def _sum(traffic: Traffic, purposes: Sequence[str], link: str) -> tuple[int, int]:
    chosen = [tally for kind, tally in traffic.items() if kind.purpose in purposes and kind.link == link]
    return sum(tally.bytes for tally in chosen), sum(tally.messages for tally in chosen)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each node")
    parser.add_argument("--groups", type=int, help="groups of experts; by default one per node")
    parser.add_argument("--limit", type=int, help="groups that a token may use; by default all")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="compared with the first")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mbit", type=float, help="rate of a link between two network namespaces, Mbit/s")
    parser.add_argument("--train", action="store_true", help="training steps of a small model, BF16")
    parser.add_argument("--layers", type=int, default=4, help="with --train, layers of the model")
    parser.add_argument("--port", type=int, default=29500)
    parser.add_argument("--address", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = _arguments()
    args = parser.parse_args()
    args.groups = args.groups or args.nodes
    args.limit = args.limit or args.groups
    if args.experts % (args.nodes * args.ranks) or args.experts % args.groups:
        parser.error(
            f"{args.experts} experts are not a multiple of {args.nodes * args.ranks} ranks and {args.groups} groups"
        )
    if args.top_k > args.experts // args.groups * args.limit:
        parser.error(f"top-{args.top_k} of {args.experts // args.groups * args.limit} experts in {args.limit} groups")
    if args.mbit and args.nodes != 2:
        parser.error(f"--mbit joins two nodes, not {args.nodes}")
    try:
        if args.rank is not None:
            serve(args)
        elif args.mbit:
            with joined(args.mbit) as link:
                run_at_both_ends(link, [*sys.argv, "--address", link.addresses[0]], args.ranks)
        else:
            command = ["env", "OMP_NUM_THREADS=1", "TORCH_CPP_LOG_LEVEL=ERROR", sys.executable, "-P", *sys.argv]
            run_together([*command, "--rank", str(rank)] for rank in range(args.nodes * args.ranks))
    except UsageError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
