"""Launches of dispatch and combine on a GPU, counted on the meta device for one rank of a group that does not exist.

python -P tests/comm/launches.py        # at DeepSeek-V3's widths, by phase
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.comm import exchange
from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher

VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "detach", "alias", "slice", "select", "unsqueeze"),
    *("squeeze", "expand", "as_strided", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty"),
    *("diagonal", "empty_strided", "new_empty_strided", "_reshape_alias", "lift_fresh"),
}


RANK = 0


@dataclass(frozen=True)
class Place:
    """One rank of a group without processes."""

    own: int
    ranks: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.ranks


@dataclass(frozen=True)
class Size:
    """Sizes of a layer: ranks on nodes, experts, choices of a token, tokens of a rank and hidden."""

    nodes: list[int]
    experts: int
    top_k: int
    tokens: int
    hidden: int
    limit: int  # nodes that a token may reach

    def expert_ids(self, rank: int) -> Tensor:
        """Experts of a rank's tokens, on at most `limit` nodes each."""
        generator = torch.Generator().manual_seed(rank)
        nodes, per_node = self.nodes[-1] + 1, self.experts // (self.nodes[-1] + 1)
        reached = torch.rand(self.tokens, nodes, generator=generator).argsort(1)[:, : self.limit]
        allowed = torch.zeros(self.tokens, nodes).scatter_(1, reached, 1.0).repeat_interleave(per_node, 1)
        scores = torch.rand(self.tokens, self.experts, generator=generator) * allowed
        return scores.topk(self.top_k).indices


V3 = Size([rank // 8 for rank in range(64)], 256, 8, 4096, 7168, 4)


class Launches(TorchDispatchMode):
    """Operations on the meta device that would launch a kernel, and all-to-alls, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.seen: dict[str, Counter[str]] = {}

    def note(self, name: str) -> None:
        self.seen.setdefault(self.phase, Counter())[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) and out else out
        name = func._schema.name.split("::")[1]
        if isinstance(first, Tensor) and first.is_meta and name not in VIEWS:
            self.note(name)
        return out

    def totals(self) -> dict[str, int]:
        return {phase: seen.total() for phase, seen in self.seen.items()}


class _Done:
    def wait(self) -> None:
        return None


def dispatcher_of(kind: str, size: Size, rank: int, options: DispatchOptions) -> RoutedDispatcher:
    place: Any = Place(rank, len(size.nodes))
    if kind == "flat":
        return FlatDispatcher(place, size.experts, options)
    return TwoHopDispatcher(place, size.experts, options, size.nodes)


def counts_for(kind: str, size: Size, options: DispatchOptions) -> list[int]:
    """Counts that rank RANK receives: every rank's route is begun on the CPU, and its message is noted."""
    received: list[int] = []
    for rank in range(len(size.nodes)):
        sent: list[tuple[Tensor, list[int]]] = []

        def begin(into: Tensor, rows: Tensor, receive: Any, send: list[int], group: Any, sent: Any = sent) -> list[Any]:
            sent.append((rows, send))
            return []

        with mock.patch.object(exchange, "begin_all_to_all", begin):
            dispatcher_of(kind, size, rank, options).begin_route(size.expert_ids(rank))
        rows, splits = sent[0]
        received += rows.split(splits)[RANK].tolist()
    return received


@contextmanager
def without_peers(count: Callable[[str], None]) -> Iterator[None]:
    def begin(*_: Any) -> list[Any]:
        count("all_to_all")
        return [_Done()]

    with mock.patch.object(exchange, "begin_all_to_all", begin):
        yield


def launches_of(kind: str, size: Size = V3, options: DispatchOptions | None = None) -> Launches:
    """Launches of one forward and backward of dispatch and combine."""
    options = options or DispatchOptions()
    received = counts_for(kind, size, options)
    watch, ids = Launches(), size.expert_ids(RANK)
    on_meta = ids.to("meta")
    dispatcher = dispatcher_of(kind, size, RANK, options)

    def read(counts: Tensor) -> Any:
        if watch.phase:
            watch.note("to the host")
        return _as_shaped(received, counts, size, ids)

    x = torch.empty(size.tokens, size.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weights = torch.empty(size.tokens, size.top_k, device="meta", requires_grad=True)
    with mock.patch.object(dispatcher, "read_counts", read), without_peers(lambda name: None):
        dispatcher.dispatch(x, on_meta, weights)  # makes the tables that later routes share
    with mock.patch.object(dispatcher, "read_counts", read), without_peers(watch.note), watch:
        watch.phase = "F.attention"
        route = dispatcher.begin_route(on_meta)
        watch.phase = "F.dispatch"
        pending = dispatcher.begin_dispatch(x, on_meta, weights, route)
        watch.phase = "F.experts"
        dispatched = pending.wait()
        y = dispatched.x.detach().requires_grad_()
        watch.phase = "F.combine"
        returning = dispatcher.begin_combine(y, dispatched)
        watch.phase = "F.finish"
        out = returning.wait()
        grad, grad_rows = torch.empty_like(out), torch.empty_like(dispatched.x)
        grad_weights = torch.empty_like(dispatched.weights)
        watch.phase = "combine, backward"
        out.backward(grad)
        watch.phase = "dispatch, backward"
        torch.autograd.backward((dispatched.x, dispatched.weights), (grad_rows, grad_weights))
    return watch


def _as_shaped(received: list[int], counts: Tensor, size: Size, ids: Tensor) -> Any:
    """The numbers that a route asks for: what it received, with the counts of its own tokens."""
    ranks, per_rank = len(size.nodes), size.experts // len(size.nodes)
    if counts.dim() == 2:  # flat: sent, received, dropped
        sent = torch.bincount(ids.flatten(), minlength=size.experts).view(ranks, per_rank).tolist()
        rows = [received[start : start + per_rank] for start in range(0, len(received), per_rank)]
        return [*sent, *rows, [0] * per_rank]
    nodes = torch.tensor(size.nodes)[ids // per_rank]
    wanted = torch.zeros(len(ids), size.nodes[-1] + 1, dtype=torch.int64).scatter_(1, nodes, 1)
    return [*received, *wanted.sum(0).tolist()]


def main() -> None:
    for kind in ("flat", "two-hop"):
        watch = launches_of(kind)
        print(f"{kind}: {sum(watch.totals().values())} launches")
        for phase, seen in watch.seen.items():
            print(f"  {phase:20} {seen.total():4}  {dict(seen.most_common(12))}")


if __name__ == "__main__":
    main()
