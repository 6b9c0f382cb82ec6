"""Stand-in for `deep_ep` on CPUs: its signatures, its rules and its documented results, over gloo.

    library = stand_in(Settings(peers=2))       # 2 ranks per node
    buffer = library.module.Buffer(group, ...)

The stand-in enforces the library's behaviour (1.2.1 and 2.1.0, read in their source), above all surprising behaviour:

- a call that a recorded release would not bind raises TypeError
- the results of a launched call are garbage until its event has been waited for, and its inputs must not change before;
  counts of tokens are valid at once, and layouts and handles may be passed on, as they stay on the library's stream
- `combine` sums without weights; gate weights are returned through its `topk_weights`
- a dispatch with a handle takes no experts, no weights, the SMs of the first dispatch and, between nodes, its row size
- weights that arrive for experts of other ranks have no meaning; the elastic generation does not zero these weights
- the legacy generation delivers by (source rank, token), the elastic one in an order that varies
- sums are FP32 over the ranks of a node, rounded, then over nodes: by rank, or by a token's slots (elastic)

Nothing runs asynchronously: a call moves its data before it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.deepep.library import Library, read_library
from counterflow.tests.comm.deepep_parts import (
    RECORDED,
    Common,
    Config,
    Outputs,
    Settings,
    Way,
    binds,
    check_elastic_streams,
    check_legacy_streams,
    on_their_stream,
    require,
)
from counterflow.tests.fp8.record_te_signatures import parse


def stand_in(settings: Settings) -> Library:
    """Return the library as `find_library` would."""
    module: Any = ModuleType("deep_ep")
    module.Buffer = type("Buffer", (_Legacy,), {"settings": settings})
    if f"{_Elastic.name}.dispatch" in RECORDED[settings.release]["callables"]:
        module.ElasticBuffer = type("ElasticBuffer", (_Elastic,), {"settings": settings})
        module.topk_idx_t, module.__version__ = torch.int64, settings.release
    return read_library(module)


@dataclass
class LegacyHandle:
    way: Way
    buffer: Any
    sms: int


class _Legacy(Common):
    name = "Buffer"
    num_sms = 20

    @binds("Buffer.__init__")
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        self.open(group, explicitly_destroy)
        self._bytes, self._queue_pairs = (num_nvl_bytes, num_rdma_bytes), num_qps_per_rank

    destroy = binds("Buffer.destroy")(Common.destroy)

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        parse(RECORDED[cls.settings.release]["callables"]["Buffer.set_num_sms"]).bind(new_num_sms)
        require(new_num_sms % 2 == 0, "the SM count must be even")
        cls.num_sms = new_num_sms

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        require(num_ranks in RECORDED[cls.settings.release]["groups"], f"unsupported number of EP ranks: {num_ranks}")
        return Config(cls.num_sms, cls.settings.peers)

    get_combine_config = get_dispatch_config

    @binds("Buffer.get_dispatch_layout")
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_legacy_streams(previous_event, async_finish, allocate_on_comm_stream)
        self.check_choice(topk_idx, None)
        way = Way(self.group, topk_idx, num_experts)
        outputs = Outputs(async_finish, topk_idx)
        return (*[part if part is None else outputs.give(part) for part in self._layout(way)], outputs.event())

    def _layout(self, way: Way) -> list[Tensor | None]:
        to_node = torch.stack([way.in_rank[:, self.node_of == node].any(1) for node in range(self.nodes)], 1)
        per_rdma_rank = to_node.sum(0).int() if self.nodes > 1 else None
        return [way.in_rank.sum(0).int(), per_rdma_rank, way.per_expert.int(), way.in_rank]

    @binds("Buffer.dispatch")
    def dispatch(
        self,
        x: Any,
        handle: LegacyHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_legacy_streams(previous_event, async_finish, allocate_on_comm_stream)
        data, scales = self.payload(x)
        sms = self._check_config(config or self.get_dispatch_config(self.group.size()), data.shape[1])
        outputs = Outputs(async_finish, data, scales, topk_idx, topk_weights)
        if handle is not None:
            require(topk_idx is None and topk_weights is None, "with a handle neither experts nor weights are given")
            way = self._check_handle(handle, sms)
            require(data.shape[0] == way.ids.shape[0], "as many tokens as in the first dispatch")
            return (self._arrived(way, data, scales, outputs), None, None, None, None, outputs.event())
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        require(topk_idx is not None and topk_weights is not None, "experts and weights, as gate weights are sent")
        assert topk_idx is not None and topk_weights is not None
        self.check_choice(topk_idx, topk_weights)
        require(topk_idx.shape[0] == data.shape[0], "experts for every token")
        way = Way(self.group, topk_idx, num_tokens_per_expert.shape[0])
        given = [num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank]
        for part, expected in zip(given, self._layout(way), strict=True):
            require((part is None) == (expected is None), "token counts of nodes, if there are several")
            if part is not None and expected is not None:
                same = part.dtype == expected.dtype and torch.equal(on_their_stream(part), expected)
                require(same, "the ids' layout")
        local = self.local(way.send(topk_idx), way)
        weights = way.send(topk_weights).masked_fill(local < 0, 0.0)
        counts = self.per_expert(local, way, expert_alignment)
        received = self._arrived(way, data, scales, outputs)
        made = LegacyHandle(way, self, sms)
        return received, outputs.give(local), outputs.give(weights), counts, made, outputs.event()

    @binds("Buffer.combine")
    def combine(
        self,
        x: Tensor,
        handle: LegacyHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_legacy_streams(previous_event, async_finish, allocate_on_comm_stream)
        self.check_rows(x, topk_weights)
        sms = self._check_config(config or self.get_combine_config(self.group.size()), x.shape[1])
        way = self._check_handle(handle, sms)
        outputs = Outputs(async_finish, x, topk_weights)
        keys = torch.arange(way.ranks).expand(way.ids.shape[0], -1)
        sums = outputs.give(way.send_back(x, keys, self.node_of))
        weights = None if topk_weights is None else outputs.give(way.send_back(topk_weights, keys, self.node_of))
        return sums, weights, outputs.event()

    def _arrived(self, way: Way, data: Tensor, scales: Tensor | None, outputs: Outputs) -> Any:
        rows = outputs.give(way.send(data))
        return rows if scales is None else (rows, outputs.give(way.send(scales)))

    def _check_config(self, config: Config, width: int) -> int:
        require(config.num_sms % 2 == 0, "an even number of SMs")
        hints = (
            config.get_nvl_buffer_size_hint(2 * width, self.group.size()),
            config.get_rdma_buffer_size_hint(2 * width, self.group.size()),
        )
        require(
            all(size >= hint for size, hint in zip(self._bytes, hints, strict=True)),
            "memory of at least the hinted size",
        )
        require(self.nodes == 1 or self._queue_pairs >= config.num_sms, "one queue pair per SM")
        return config.num_sms

    def _check_handle(self, handle: LegacyHandle, sms: int) -> Way:
        require(isinstance(handle, LegacyHandle) and handle.buffer is self, "a handle of this buffer")
        require(handle.sms == sms, "the SMs of the dispatch that the handle is of")
        return handle.way


class EPHandle:
    """Part of the record of an elastic dispatch."""

    def __init__(self, way: Way, buffer: Any, num_sms: int, num_experts: int, most: int) -> None:
        self.way, self.buffer, self.num_sms = way, buffer, num_sms
        self.num_experts, self.num_max_tokens_per_rank, self.expert_alignment = num_experts, most, 1
        self.topk_idx = way.ids
        self.num_recv_tokens = sum(way.received)
        self.num_recv_tokens_per_expert_list: list[int] = []
        self.recv_src_metadata = torch.empty(0)
        self.itemsize = 0


class _Elastic(Common):
    name = "ElasticBuffer"

    @binds("ElasticBuffer.__init__")
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        require(num_bytes is not None or (num_max_tokens_per_rank > 0 and hidden > 0), "a size")
        require(allow_hybrid_mode and allow_multiple_reduction and not deterministic, "modes of the stand-in")
        self.open(group, explicitly_destroy)
        self._hidden, self._top_k, self._fp8 = hidden, num_topk, use_fp8_dispatch
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        sizes: list[Any] = [None] * group.size()
        dist.all_gather_object(sizes, num_max_tokens_per_rank, group)
        require(len(set(sizes)) == 1, "all ranks hold the same number of tokens")
        self._shuffles = torch.Generator().manual_seed(group.rank())

    destroy = binds("ElasticBuffer.destroy")(Common.destroy)

    @binds("ElasticBuffer.dispatch")
    def dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, ...]:
        check_elastic_streams(previous_event, allocate_on_comm_stream)
        require(num_sms > 0, "its estimate of SMs is not for node-limited routing, and needs the number of experts")
        data, scales = self.payload(x)
        self._check_size(data.shape, 0 if topk_idx is None else topk_idx.shape[1])
        outputs = Outputs(async_with_compute_stream, data, scales, topk_idx, topk_weights)
        if handle is None:
            assert topk_idx is not None and num_experts is not None, "experts, or a handle"
            require(topk_idx.shape[0] == data.shape[0], "experts for every token")
            self.check_choice(topk_idx, topk_weights)
            way = Way(self.group, topk_idx, num_experts)
            way.order = self._shuffled(way)
            handle = EPHandle(way, self, num_sms, num_experts, self.num_max_tokens_per_rank)
            handle.itemsize = data.element_size()
            self._describe(handle, way, expert_alignment or 1, outputs)
        else:
            require(topk_idx is None and topk_weights is None, "with a handle neither experts nor weights are given")
            way = self._check_handle(handle)
            require(not do_cpu_sync, "with a handle there are no counts to wait for")
            require(data.shape[0] == way.ids.shape[0], "as many tokens as in the first dispatch")
            same = (handle.num_sms, handle.itemsize) == (num_sms, data.element_size())
            require(self.nodes == 1 or same, "between nodes, the SMs and the size of row of the first dispatch")
        rows = outputs.give(way.send(data))
        received = rows if scales is None else (rows, outputs.give(way.send(scales)))
        weights = None if topk_weights is None else outputs.give(way.send(topk_weights))
        local = outputs.give(self.local(way.send(way.ids), way))
        return received, local, weights, handle, outputs.event()

    def _describe(self, handle: EPHandle, way: Way, alignment: int, outputs: Outputs) -> None:
        counts = self.per_expert(self.local(way.send(way.ids), way), way, alignment)
        handle.num_recv_tokens_per_expert_list, handle.expert_alignment = counts, alignment
        number = way.send(torch.arange(way.ids.shape[0], dtype=torch.int32) + way.rank * self.num_max_tokens_per_rank)
        table = torch.full((len(number), 2 + way.ids.shape[1]), -1, dtype=torch.int32)
        table[:, 0] = number
        handle.recv_src_metadata = outputs.give(table)

    def _shuffled(self, way: Way) -> Tensor:
        """Order of arrival: by the local index of the source rank, and in any order among tokens of one index."""
        index = torch.repeat_interleave(torch.arange(way.ranks) % self.settings.peers, torch.tensor(way.received))
        mixed = torch.randperm(len(index), generator=self._shuffles)
        return mixed[index[mixed].argsort(stable=True)]

    @binds("ElasticBuffer.combine")
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_elastic_streams(previous_event, allocate_on_comm_stream)
        self.check_rows(x, topk_weights)
        way = self._check_handle(handle)
        self._check_size((0, x.shape[1]), way.ids.shape[1])
        outputs = Outputs(async_with_compute_stream, x, topk_weights)
        rank_of_slot = torch.where(way.ids < 0, -1, way.ids // way.per_rank)
        slots = torch.arange(way.ids.shape[1])
        last = torch.stack([((rank_of_slot == rank) * (slots + 1)).amax(1) for rank in range(way.ranks)], 1)
        sums = outputs.give(way.send_back(x, last, self.node_of))
        weights = None
        if topk_weights is not None:  # each slot's weight from the rank of its expert, zero without one
            weights = outputs.give(way.send_back(topk_weights, last, self.node_of).masked_fill(way.ids < 0, 0.0))
        return sums, weights, outputs.event()

    def _check_size(self, shape: Sequence[int], top_k: int) -> None:
        require(shape[0] <= self.num_max_tokens_per_rank, "no more tokens than it was made for")
        require(shape[1] <= self._hidden and top_k <= self._top_k, "no larger than it was made for")

    def _check_handle(self, handle: EPHandle) -> Way:
        require(isinstance(handle, EPHandle) and handle.buffer is self, "a handle of this buffer")
        return handle.way
