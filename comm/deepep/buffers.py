"""DeepEP's two generations behind one small interface.

Both are called so that they launch and do not wait: kernels run on DeepEP's own stream, behind all that the current
stream was given before the call, and what they return may be used once the current stream waits for their event. The
host waits in one place only: a dispatch needs to know how many tokens arrive before it can return.

A buffer belongs to a group, not to a layer: its memory is used while a call runs, and calls run one after another.
T tokens of this rank, K top-k, H hidden, A tokens that arrive, E_local experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...settings import UsageError
from .library import Generation, Job, Library

Result = TypeVar("Result")

Payload = Tensor | tuple[Tensor, Tensor]
"""Rows BF16 [T, H], or their codes E4M3 [T, H] with scales FP32 [T, H / 128]."""

QUEUE_PAIRS = 24
"""The legacy generation's default for each rank; its kernels want at least one an SM."""


class Received(NamedTuple):
    """What a dispatch brings."""

    payload: Payload
    """[A, ...]"""
    local_ids: Tensor
    """int64 [A, K], this rank's experts by their local number, -1 for those of others."""
    weights: Tensor
    """FP32 [A, K], of meaning only for this rank's experts."""
    arrival: Tensor | None
    """int64 [A], where the tokens lie when taken by (source rank, token); None if they lie so already."""


class Launched(Generic[Result]):
    """A call under way; `wait` once for its result, which makes the current stream wait, not the host."""

    def __init__(self, event: Any, finish: Callable[[], Result]) -> None:
        self._left: list[tuple[Any, Callable[[], Result]]] = [(event, finish)]

    def wait(self) -> Result:
        event, finish = self._left.pop()  # and with them, in the end, the last references to what was received
        event.current_stream_wait()
        return finish()


class Dispatching(NamedTuple):
    """A dispatch under way. What is known on the host is there at once."""

    launched: Launched[Received]
    handle: Any
    """What brings the rows back, and sends others the same way."""
    tokens_per_expert: list[int]
    """Of each expert of this rank."""


class Buffer(Protocol):
    """One of the generations."""

    tokens: int | None
    """The most tokens of a rank that it can dispatch, None for any number."""
    ids: torch.dtype
    """Of the expert ids that it takes."""

    def begin(self, expert_ids: Tensor, num_experts: int) -> Any:
        """Launch what can be done as soon as the experts are chosen; expert_ids [T, K], -1 is sent nowhere."""

    def dispatch(
        self, payload: Payload, expert_ids: Tensor, weights: Tensor, num_experts: int, layout: Any
    ) -> Dispatching:
        """To the experts, with gate weights FP32 [T, K]; `layout` is from `begin`. Waits for the counts."""

    def dispatch_again(self, payload: Payload, handle: Any) -> Launched[Payload]:
        """Other rows the way of an earlier dispatch, to arrive where its own did: [A, ...]."""

    def combine(self, rows: Tensor, handle: Any, weights: Tensor | None) -> Launched[tuple[Tensor, Tensor | None]]:
        """Rows BF16 [A, H], and FP32 [A, K], back to the tokens and summed, without weights: [T, H] and [T, K]."""

    def close(self) -> None:
        """Give its memory back; every rank of the group does. A process that fails must not, for it would wait."""


class LegacyBuffer:
    """`deep_ep.Buffer`: the ranks of a token are found first, then the token is sent."""

    def __init__(self, library: Library, group: dist.ProcessGroup, job: Job) -> None:
        kind = library.module.Buffer
        # Counts of SMs are a global of theirs; both configurations are kept, so nobody changes it between two calls,
        # which have to agree on it.
        kind.set_num_sms(job.sms)
        self._dispatch = kind.get_dispatch_config(group.size())
        self._combine = kind.get_combine_config(group.size())
        hints, ranks, width = (self._dispatch, self._combine), group.size(), job.hidden * torch.bfloat16.itemsize
        self._buffer = kind(
            group,
            num_nvl_bytes=max(hint.get_nvl_buffer_size_hint(width, ranks) for hint in hints),
            num_rdma_bytes=max(hint.get_rdma_buffer_size_hint(width, ranks) for hint in hints),
            num_qps_per_rank=max(QUEUE_PAIRS, job.sms),
            explicitly_destroy=True,
        )
        self.tokens: int | None = None
        self.ids: torch.dtype = getattr(library.module, "topk_idx_t", torch.int64)

    def begin(self, expert_ids: Tensor, num_experts: int) -> Any:
        # Its event is not needed: what it computes is read on DeepEP's own stream only.
        return self._buffer.get_dispatch_layout(expert_ids, num_experts, async_finish=True)[:-1]

    def dispatch(
        self, payload: Payload, expert_ids: Tensor, weights: Tensor, num_experts: int, layout: Any
    ) -> Dispatching:
        per_rank, per_rdma_rank, per_expert, is_token_in_rank = layout
        received, local_ids, row_weights, counts, handle, event = self._buffer.dispatch(
            payload,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=expert_ids,
            topk_weights=weights,
            config=self._dispatch,
            async_finish=True,
        )
        # Tokens come by source rank, and by their number within it.
        return Dispatching(
            Launched(event, lambda: Received(received, local_ids.long(), row_weights, None)), handle, counts
        )

    def dispatch_again(self, payload: Payload, handle: Any) -> Launched[Payload]:
        received, _, _, _, _, event = self._buffer.dispatch(
            payload, handle=handle, config=self._dispatch, async_finish=True
        )
        return Launched(event, lambda: received)

    def combine(self, rows: Tensor, handle: Any, weights: Tensor | None) -> Launched[tuple[Tensor, Tensor | None]]:
        sums, sums_of_weights, event = self._buffer.combine(
            rows, handle, topk_weights=weights, config=self._combine, async_finish=True
        )
        return Launched(event, lambda: (sums, sums_of_weights))

    def close(self) -> None:
        self._buffer.destroy()


class ElasticBuffer:
    """`deep_ep.ElasticBuffer`: made for a number of tokens, and the handle keeps the experts.

    Its own estimate of SMs assumes that any ranks are chosen, which is wrong for node-limited routing, so every call
    says how many: where a call does not, it estimates, and a cached dispatch could not even do that.
    """

    def __init__(self, library: Library, group: dist.ProcessGroup, job: Job) -> None:
        self._buffer = library.module.ElasticBuffer(
            group,
            num_max_tokens_per_rank=job.tokens,
            hidden=job.hidden,
            num_topk=job.top_k,
            use_fp8_dispatch=job.fp8,
            explicitly_destroy=True,
        )
        self._sms = job.sms
        self.tokens: int | None = job.tokens
        self.ids: torch.dtype = getattr(library.module, "topk_idx_t", torch.int64)

    def begin(self, expert_ids: Tensor, num_experts: int) -> Any:
        return None

    def dispatch(
        self, payload: Payload, expert_ids: Tensor, weights: Tensor, num_experts: int, layout: Any
    ) -> Dispatching:
        received, local_ids, row_weights, handle, event = self._buffer.dispatch(
            payload,
            topk_idx=expert_ids,
            topk_weights=weights,
            num_experts=num_experts,
            num_sms=self._sms,
            async_with_compute_stream=True,
        )

        def finish() -> Received:
            # Tokens come in another order each time, and with them the sums of weight gradients would change. The
            # first column of the handle's table numbers them by (source rank, token); sorting it sorts no rows.
            arrival = handle.recv_src_metadata[:, 0].argsort()
            return Received(received, local_ids.long(), row_weights, arrival)

        return Dispatching(Launched(event, finish), handle, handle.num_recv_tokens_per_expert_list)

    def dispatch_again(self, payload: Payload, handle: Any) -> Launched[Payload]:
        received, _, _, _, event = self._buffer.dispatch(
            payload, handle=handle, num_sms=self._sms, async_with_compute_stream=True
        )
        return Launched(event, lambda: received)

    def combine(self, rows: Tensor, handle: Any, weights: Tensor | None) -> Launched[tuple[Tensor, Tensor | None]]:
        sums, sums_of_weights, event = self._buffer.combine(
            rows, handle, topk_weights=weights, num_sms=self._sms, async_with_compute_stream=True
        )
        return Launched(event, lambda: (sums, sums_of_weights))

    def close(self) -> None:
        self._buffer.destroy()


BUFFERS: dict[Generation, type[LegacyBuffer] | type[ElasticBuffer]] = {
    "elastic": ElasticBuffer,
    "legacy": LegacyBuffer,
}


def open_buffer(
    library: Library, group: dist.ProcessGroup, job: Job, generation: Generation | None = None
) -> LegacyBuffer | ElasticBuffer:
    """DeepEP's memory for a group, which all layers and chunks share; every rank of the group makes it, alike.

    Raises UsageError if it cannot be had: a GPU without NVLink or a network without RDMA is first noticed here.
    """
    chosen = library.choose(generation)
    try:
        return BUFFERS[chosen](library, group, job)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(
            f"DeepEP {library.version} made no {chosen} buffer for {group.size()} ranks ({job}): {error}"
        ) from error
