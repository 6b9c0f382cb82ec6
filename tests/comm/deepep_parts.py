"""Common parts of both generations of the stand-in for DeepEP; see `deepep_stand_in.py`."""

from __future__ import annotations

import functools
import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.tests.comm.record_deepep_signatures import RECORD
from counterflow.tests.fp8.record_te_signatures import parse

RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
CALLS: Counter[str] = Counter()
"""Number of calls of each callable in this process."""


@dataclass(frozen=True)
class Settings:
    """Settings of the stand-in.

    peers: GPUs per node, 8 in the legacy generation.
    float32: rows may be FP32 in place of BF16, so that results can be compared to the last bit.
    """

    release: str = "2.1.0"
    peers: int = 8
    float32: bool = False


def require(holds: bool, rule: str) -> None:
    assert holds, f"DeepEP: {rule}"


def binds(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a method refuse the calls that one of the recorded releases would refuse."""
    known = [release["callables"][name] for release in RECORDED.values() if name in release["callables"]]
    signatures = [parse(text) for text in known]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        bound_first = 1 if "self" in inspect.signature(function).parameters else 0

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            for signature in signatures:
                signature.bind(*args[bound_first:], **named)
            CALLS[name] += 1
            return function(*args, **named)

        return call

    return wrap


class EventOverlap:
    """Event of a launched call; empty for a call that was complete."""

    def __init__(self, deliver: Callable[[], None] | None) -> None:
        self.event = deliver

    @binds("EventOverlap.current_stream_wait")
    def current_stream_wait(self, release_handle: bool = False) -> None:
        require(self.event is not None, "an event that is missing, or was released, cannot be waited for")
        assert self.event is not None
        self.event()
        if release_handle:
            self.event = None


class Outputs:
    """Results of a call: valid at once, or for a launched call after the wait for its event."""

    def __init__(self, launched: bool, *inputs: Tensor | None) -> None:
        self._launched = launched
        self._inputs = [(given, given._version) for given in inputs if given is not None]
        self._late: list[tuple[Tensor, Tensor]] = []

    def give(self, value: Tensor) -> Tensor:
        if not self._launched:
            return value
        empty = torch.empty_like(value)
        self._late.append((empty, value))
        garbage = float("nan") if value.is_floating_point() and value.itemsize > 1 else 0
        empty.view(torch.uint8).fill_(127) if value.itemsize == 1 and value.dtype != torch.bool else empty.fill_(
            garbage
        )
        empty.on_their_stream = value  # type: ignore[attr-defined]
        return empty

    def event(self) -> EventOverlap:
        return EventOverlap(self._deliver if self._launched else None)

    def _deliver(self) -> None:
        for given, version in self._inputs:
            require(given._version == version, "an input changed while it was being read")
        for empty, value in self._late:
            empty.copy_(value)
        self._late = []


def on_their_stream(given: Tensor) -> Tensor:
    """Value of a result for the library's own kernels, which run after the kernels that compute it."""
    found: Tensor = getattr(given, "on_their_stream", given)
    return found


def check_legacy_streams(previous_event: Any, launched: bool, on_comm: bool) -> None:
    require(not on_comm or (previous_event is not None and launched), "memory of its stream needs both events")


def check_elastic_streams(previous_event: Any, on_comm: bool) -> None:
    require(previous_event is None or on_comm, "after an event, memory must belong to its own stream")


class Way:
    """Source and destination of all tokens of a dispatch, as a handle records them."""

    def __init__(self, group: dist.ProcessGroup, ids: Tensor, num_experts: int) -> None:
        self.group, self.ids = group, ids.clone()
        self.ranks, self.rank = group.size(), group.rank()
        require(num_experts % self.ranks == 0, "experts are shared evenly")
        require(bool((ids < num_experts).all()), "expert ids are below the number of experts")
        self.per_rank = num_experts // self.ranks
        rank_of_slot = torch.where(ids < 0, self.ranks, ids // self.per_rank)
        self.in_rank = torch.stack([(rank_of_slot == rank).any(1) for rank in range(self.ranks)], 1)
        self.sent = [self.in_rank[:, rank].nonzero().view(-1) for rank in range(self.ranks)]
        self.per_expert = torch.bincount(ids[ids >= 0], minlength=num_experts)
        counts = torch.tensor([len(tokens) for tokens in self.sent])
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        self.received: list[int] = received.tolist()
        self.order = torch.arange(sum(self.received))
        """Order of arrival of the tokens, as indices into the order of (source rank, token)."""

    def send(self, rows: Tensor) -> Tensor:
        """Send rows of the tokens to their experts' ranks: [T, ...] -> [A, ...]."""
        copies = torch.cat([rows[tokens] for tokens in self.sent])
        return self._swap(copies, [len(tokens) for tokens in self.sent], self.received)[self.order]

    def send_back(self, rows: Tensor, keys: Tensor, node_of: Tensor) -> Tensor:
        """Return rows [A, ...] to the tokens, as sums [T, ...] over the ranks of a node, in the order of their keys
        [T, ranks], and then over nodes."""
        require(rows.shape[0] == len(self.order), "as many rows are sent back as were sent")
        by_source = torch.empty_like(rows).index_copy_(0, self.order, rows)
        sent = [len(tokens) for tokens in self.sent]
        parts = self._swap(by_source, self.received, sent).split(sent)
        nodes, tokens = int(node_of.max()) + 1, self.ids.shape[0]
        keys = keys.masked_fill(~self.in_rank, -1)
        by_rank = torch.zeros(tokens, self.ranks, *rows.shape[1:])
        for rank, part in enumerate(parts):
            by_rank[self.sent[rank], rank] = part.float()
        by_node = torch.zeros(tokens, nodes, *rows.shape[1:])
        node_keys = torch.full((tokens, nodes), -1)
        for node in range(nodes):
            members = (node_of == node).nonzero().view(-1)
            by_node[:, node] = _sum(by_rank[:, members], keys[:, members]).to(rows.dtype).float()
            node_keys[:, node] = keys[:, members].amax(1)
        return _sum(by_node, node_keys).to(rows.dtype)

    def _swap(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Exchange rows as bytes, because gloo has no FP8 and no rows without bytes."""
        width = rows[:1].numel() if rows.shape[0] else int(torch.tensor(rows.shape[1:]).prod())
        bytes_of_row = width * rows.element_size()
        out = rows.contiguous().view(torch.uint8).view(rows.shape[0], bytes_of_row)
        into = torch.empty(sum(receive), bytes_of_row, dtype=torch.uint8)
        dist.all_to_all_single(into, out, receive, send, group=self.group)
        return into.view(rows.dtype).view(sum(receive), *rows.shape[1:])


def _sum(parts: Tensor, keys: Tensor) -> Tensor:
    """Sum of FP32 [T, n, ...] over n, in the ascending order of keys [T, n]."""
    order = keys.argsort(1)
    total = torch.zeros(parts.shape[0], *parts.shape[2:])
    for index in order.unbind(1):
        total += parts[torch.arange(len(parts)), index]
    return total


class Common:
    """Checks that both generations' buffers make."""

    settings: Settings
    name: str

    def open(self, group: dist.ProcessGroup, explicitly_destroy: bool) -> None:
        self.group, self._owned, self._destroyed = group, explicitly_destroy, False
        peers = self.settings.peers
        require(group.size() <= peers or group.size() % peers == 0, "all nodes have equally many ranks")
        self.node_of = torch.arange(group.size()) // peers
        self.nodes = int(self.node_of[-1]) + 1

    def destroy(self) -> None:
        require(self._owned, "`explicitly_destroy` must be set")
        require(not self._destroyed, "it is destroyed once")
        self._destroyed = True
        dist.barrier(self.group)

    def payload(self, x: Any) -> tuple[Tensor, Tensor | None]:
        require(not self._destroyed, "it was destroyed")
        data, scales = x if isinstance(x, tuple) else (x, None)
        carried = (torch.bfloat16, torch.float32) if self.settings.float32 else (torch.bfloat16,)
        require(data.dtype in (carried if scales is None else (torch.float8_e4m3fn,)), f"rows of {data.dtype}")
        require(data.dim() == 2 and data.is_contiguous(), "rows are a contiguous matrix")
        self._check_width(data.shape[1], scales is not None)
        if scales is not None:
            require(scales.dtype == torch.float32, "scales are FP32")
            require(tuple(scales.shape) == (data.shape[0], data.shape[1] // 128), "one scale per 128 values")
        return data, scales

    def _check_width(self, width: int, fp8: bool) -> None:
        unit = 256 if self.nodes > 1 or self.name == "ElasticBuffer" else 128 if fp8 else 8
        require(width % unit == 0, f"rows of a multiple of {unit} values")

    def check_rows(self, x: Tensor, weights: Tensor | None) -> None:
        require(x.dtype == torch.bfloat16 or (self.settings.float32 and x.dtype == torch.float32), f"sums of {x.dtype}")
        self.payload(x)
        if weights is not None:
            require(weights.dtype == torch.float32 and weights.is_contiguous(), "weights are contiguous FP32")
            require(weights.dim() == 2 and weights.shape[0] == x.shape[0], "weights of every row")

    @staticmethod
    def check_choice(ids: Tensor, weights: Tensor | None) -> None:
        require(ids.dtype == torch.int64 and ids.dim() == 2 and ids.is_contiguous(), "ids are contiguous int64 [T, K]")
        require(ids.shape[1] <= 32, "at most 32 choices")
        ordered = ids.sort(1).values
        require(not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()), "no expert twice")
        if weights is not None:
            require(weights.dtype == torch.float32 and weights.is_contiguous(), "weights are contiguous FP32")
            require(weights.shape == ids.shape, "one weight per choice")

    def local(self, ids: Tensor, way: Way) -> Tensor:
        local = ids - way.rank * way.per_rank
        return local.masked_fill((ids < 0) | (local < 0) | (local >= way.per_rank), -1)

    @staticmethod
    def per_expert(local: Tensor, way: Way, alignment: int) -> list[int]:
        counts = torch.bincount(local[local >= 0], minlength=way.per_rank).tolist()
        return [-(-count // alignment) * alignment for count in counts]


class Config:
    """Sizes of the pieces in which tokens are sent. The numbers are not DeepEP's."""

    def __init__(self, num_sms: int, peers: int) -> None:
        self.num_sms, self.peers = num_sms, peers

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms // 2 * min(num_ranks, self.peers) * 256 * (hidden_bytes + 2048)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= self.peers else self.num_sms // 2 * (num_ranks // self.peers) * 256 * hidden_bytes
