"""DeepEP's two generations behind one small interface.

Calls launch and do not wait: kernels run on DeepEP's own stream, after the work that was on the current stream at the
call. Their results may be used once the current stream waits for their event. The host waits in one place only: a
dispatch cannot return before the number of arriving tokens is known.

A buffer belongs to a group, not to a layer: its memory is in use while a call runs, and calls run one after another.
T tokens of this rank, K top-k, H hidden, A tokens that arrive, E_local experts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...settings import UsageError
from .library import Generation, Job, Library

Result = TypeVar("Result")

Payload = Tensor | tuple[Tensor, Tensor]
"""Rows BF16 [T, H], or their codes E4M3 [T, H] with scales FP32 [T, H / 128]."""

TIMEOUTS = ("num_cpu_timeout_secs", "num_gpu_timeout_secs")
"""Arguments of the elastic generation for the time that the host and the kernels wait for other ranks. The legacy
generation waits 100 s, a constant of its kernels."""
QUEUE_PAIRS = 24
"""Queue pairs per rank by the legacy generation's default; its kernels need at least one per SM."""


class Received(NamedTuple):
    """Result of a dispatch."""

    payload: Payload
    """[A, ...]"""
    local_ids: Tensor
    """int64 [A, K], local numbers of this rank's experts, -1 for experts of other ranks."""
    weights: Tensor
    """FP32 [A, K], valid for this rank's experts only."""
    arrival: Tensor | None
    """int64 [A], rows of the tokens in the order of (source rank, token); None if they arrived in this order."""


class Launched(Generic[Result]):
    """Launched call. `wait` returns its result, once, and makes the current stream wait, not the host."""

    def __init__(self, event: Any, finish: Callable[[], Result]) -> None:
        self._left: list[tuple[Any, Callable[[], Result]]] = [(event, finish)]

    def wait(self) -> Result:
        event, finish = self._left.pop()  # no reference to the received tensors may stay here
        event.current_stream_wait()
        return finish()


class Dispatching(NamedTuple):
    """Launched dispatch. Values on the host are available at once."""

    launched: Launched[Received]
    handle: Any
    """DeepEP's record of the route, for bringing the rows back and for sending other rows along the same route."""
    tokens_per_expert: list[int]
    """Tokens of each expert of this rank."""


class Buffer(Protocol):
    """Buffer of one of the two generations."""

    tokens: int | None
    """Largest number of tokens of a rank in one dispatch, None for any number."""
    ids: torch.dtype
    """Type of expert ids."""

    def begin(self, expert_ids: Tensor, num_experts: int) -> Any:
        """Launch the part that needs the chosen experts only; expert_ids [T, K], -1 is sent nowhere."""

    def dispatch(
        self, payload: Payload, expert_ids: Tensor, weights: Tensor, num_experts: int, layout: Any
    ) -> Dispatching:
        """Send rows to the experts, with gate weights FP32 [T, K]; `layout` is from `begin`. Waits for the counts."""

    def dispatch_again(self, payload: Payload, handle: Any) -> Launched[Payload]:
        """Send other rows along the route of an earlier dispatch, to the same positions: [A, ...]."""

    def combine(self, rows: Tensor, handle: Any, weights: Tensor | None) -> Launched[tuple[Tensor, Tensor | None]]:
        """Return rows BF16 [A, H] and numbers FP32 [A, K] to the tokens, as unweighted sums [T, H] and [T, K]."""

    def close(self) -> None:
        """Free the memory, on every rank of the group. A failing process must not call it, and so wait for others."""


class LegacyBuffer:
    """`deep_ep.Buffer`: computes the ranks of the tokens first, then sends the tokens."""

    def __init__(self, library: Library, group: dist.ProcessGroup, job: Job) -> None:
        kind = library.module.Buffer
        # The library keeps the number of SMs in a global. Both configurations are made now and kept, because two calls
        # that belong together have to agree on the number.
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
        # The event is not needed: the results are read on DeepEP's own stream only.
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
        # Tokens arrive in the order of (source rank, token).
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
    """`deep_ep.ElasticBuffer`: made for a largest number of tokens; the handle keeps the experts.

    Every call gets the number of SMs. The library's own estimate assumes that a token may go to any ranks, which is
    wrong for node-limited routing, and a cached dispatch could not make an estimate.
    """

    def __init__(self, library: Library, group: dist.ProcessGroup, job: Job) -> None:
        kind = library.module.ElasticBuffer
        known = signature(kind.__init__).parameters
        seconds = max(math.ceil(job.timeout), 1)
        self._buffer = kind(
            group,
            num_max_tokens_per_rank=job.tokens,
            hidden=job.hidden,
            num_topk=job.top_k,
            use_fp8_dispatch=job.fp8,
            explicitly_destroy=True,
            **{name: seconds for name in TIMEOUTS if name in known},
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
            # Tokens arrive in a different order each time, which would change the sums of weight gradients. The first
            # column of the handle's table numbers them by (source rank, token); sorting this column moves no rows.
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
    """Open DeepEP's memory for a group, which all layers and chunks share; every rank of the group makes the
    same call.

    Raises UsageError if DeepEP cannot open it: a GPU without NVLink or a network without RDMA is first noticed here.
    """
    chosen = library.choose(generation)
    try:
        return BUFFERS[chosen](library, group, job)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(
            f"DeepEP {library.version} made no {chosen} buffer for {group.size()} ranks ({job}): {error}"
        ) from error
