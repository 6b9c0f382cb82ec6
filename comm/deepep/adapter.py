"""Token dispatch by DeepEP's kernels, a `RoutedDispatcher` like the others.

One row per token arrives at a rank, whatever the number of the token's experts there, with the local numbers of these
experts. The experts' rows are made from that row and summed again here, as in the second hop of `comm/two_hop.py`.

    dispatch            dispatch                                  new handle
    dispatch backward   combine of the rows' gradients and of the gate weights' gradients
    combine             combine, a plain sum
    combine backward    dispatch with the handle: the CPU waits for nothing

T tokens of this rank, K top-k, H hidden, A tokens that arrive, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...fp8.message import unpack_message
from ...fp8.operations import restore
from ...fp8.quantize import BlockQuantized
from ...fp8.tensor_formats import SIDE, WIRE_FORMAT
from ...kernels.routes.index import Arrivals
from ...settings import UsageError
from ..hops import Hops
from ..routed import Arrived, DispatchOptions, Returned, RoutedDispatcher
from ..steps.branch import takes_fused_kernels
from ..steps.expansion_fused import FusedExpansion
from ..steps.expansion_plain import PlainExpansion
from ..wire import Decoded, Direction, FP8Wire
from .buffers import Buffer, Payload, Received
from .crossings import BYTES_PER_CHOICE, Crossings, ranges_of


class DeepEPDispatcher(RoutedDispatcher):
    """Token dispatch by DeepEP; see `RoutedDispatcher`.

    Rows are BF16. Their sums equal those of `comm/two_hop.py`, up to the order in which DeepEP adds ranks and nodes.

    Args:
        group: the expert parallel group, of at least two ranks.
        buffer: DeepEP's memory for this group, from `open_buffer`.
        nodes: the node of each rank of the group, ascending, for the meter; by default all are on one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        options: DispatchOptions | None = None,
        *,
        buffer: Buffer,
        nodes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(group, num_experts, options)
        self.buffer = buffer
        self.rank, self.ranks = group.rank(), group.size()
        self.nodes = len(set(nodes)) if nodes is not None else 1
        assert nodes is None or len(nodes) == self.ranks, f"{len(nodes)} nodes for {self.ranks} ranks"
        assert self.ranks % self.nodes == 0, f"{self.ranks} ranks cannot be shared evenly by {self.nodes} nodes"
        self._ranges = ranges_of(self.ranks, self.nodes, num_experts // self.ranks)

    def ranges(self, device: torch.device) -> Tensor:
        """Experts of each node and rank, see `ranges_of`; copied to a device once only, as the host waits."""
        if self._ranges.device != device:
            self._ranges = self._ranges.to(device)
        return self._ranges

    def synchronise(self) -> None:
        """Wait for the ranks of the group: a kernel of DeepEP that waits for long ends the run."""
        dist.barrier(self.group)

    def close(self) -> None:
        self.buffer.close()

    def begin_route(self, expert_ids: Tensor) -> DeepEPRoute:
        return DeepEPRoute(expert_ids, self)


class DeepEPRoute:
    """Route of the tokens of one dispatch."""

    tokens_per_expert: list[int]
    offsets: Tensor

    def __init__(self, expert_ids: Tensor, dispatcher: DeepEPDispatcher) -> None:
        self._dispatcher = dispatcher
        limit = dispatcher.buffer.tokens
        if limit is not None and expert_ids.shape[0] > limit:
            raise UsageError(
                f"a rank dispatches {expert_ids.shape[0]} tokens, and DeepEP's buffer was made for {limit} a rank"
            )
        self._expert_ids = expert_ids.to(dispatcher.buffer.ids).contiguous()
        self._layout = dispatcher.buffer.begin(self._expert_ids, dispatcher.num_experts)
        self._crossings: Crossings | None = None
        if dispatcher.meter is not None:
            ranges = dispatcher.ranges(expert_ids.device)
            self._crossings = Crossings(expert_ids, ranges, dispatcher.rank, dispatcher.nodes)
        self._handle: Any = None
        self._expansion: FusedExpansion | PlainExpansion | None = None

    def complete(self) -> None:
        """Do nothing: DeepEP sends the counts with the tokens, and waits for them in its dispatch."""

    def dispatch(self, x: Tensor, weights: Tensor) -> Hops[Arrived]:
        dispatcher, dtype, width = self._dispatcher, x.dtype, x.shape[1]
        payload = self._payload(x, "forward")
        sent = dispatcher.buffer.dispatch(
            payload, self._expert_ids, weights.contiguous(), dispatcher.num_experts, self._layout
        )
        self._layout, self._handle = None, sent.handle
        self._count("dispatch", _row_bytes(payload) + self._expert_ids.shape[1] * BYTES_PER_CHOICE)
        del x, weights, payload
        yield
        received = sent.launched.wait()
        expansion = self._expand(received, sent.tokens_per_expert)
        self.tokens_per_expert, self.offsets = expansion.tokens_per_expert, expansion.offsets
        values, codes = self._rows(received.payload, dtype, width)
        return Arrived(values, expansion.row_weights, codes)

    def dispatch_backward(self, rows: Tensor | None, weights: Tensor | None) -> Hops[Returned]:
        assert self._expansion is not None
        slots = None if weights is None else self._expansion.slots(weights).contiguous()
        if rows is not None:
            partial = self._expansion.sum(rows)
        else:  # DeepEP combines no weights without rows
            assert slots is not None
            partial = slots.new_zeros((slots.shape[0], self._width), dtype=self._dtype)
        rows_need_grad = rows is not None
        unit = _row_bytes(partial) + (0 if slots is None else slots.shape[1] * slots.element_size())
        del rows, weights
        launched = self._dispatcher.buffer.combine(partial.contiguous(), self._handle, slots)
        self._count("dispatch backward", unit)
        yield
        sums, sums_of_weights = launched.wait()
        return Returned(sums if rows_need_grad else None, sums_of_weights)

    def combine(self, y: Tensor) -> Hops[Tensor]:
        assert self._expansion is not None
        partial = self._expansion.sum(y).contiguous()
        del y
        launched = self._dispatcher.buffer.combine(partial, self._handle, None)
        self._count("combine", _row_bytes(partial))
        yield
        return launched.wait()[0]

    def combine_backward(self, grad: Tensor) -> Hops[Decoded]:
        dtype, width = grad.dtype, grad.shape[1]
        # The gradient is sent in the forward's format: between nodes the handle's tables depend on the size of a row.
        payload = self._payload(grad, "backward")
        del grad
        launched = self._dispatcher.buffer.dispatch_again(payload, self._handle)
        self._count("combine backward", _row_bytes(payload))
        yield
        return self._rows(launched.wait(), dtype, width)

    def _payload(self, x: Tensor, direction: Direction) -> Payload:
        self._width, self._dtype = x.shape[1], x.dtype
        wire = self._dispatcher.options.wire
        if not isinstance(wire, FP8Wire):
            return x.contiguous()
        # The codes pass through a message, because a fused kernel makes one without waiting for the device. Splitting
        # the message takes one copy.
        codes = unpack_message(wire.encode(x, direction), x.shape[1])
        return codes.data.contiguous(), codes.scale.contiguous()

    def _rows(self, payload: Payload, dtype: torch.dtype, width: int) -> Decoded:
        """Experts' rows of the tokens that have arrived; rows of padding are zeros with scales of zero."""
        assert self._expansion is not None
        if isinstance(payload, Tensor):
            return Decoded(self._expansion.rows(payload), None)
        data, scale = payload
        data = self._expansion.rows(data.view(torch.uint8)).view(data.dtype)  # not every indexing kernel takes FP8
        codes = BlockQuantized(data, self._expansion.rows(scale), (1, SIDE), WIRE_FORMAT.fmt, width, WIRE_FORMAT.pow2)
        return Decoded(restore(codes, dtype), codes)

    def _expand(self, received: Received, rows_per_expert: list[int]) -> FusedExpansion | PlainExpansion:
        fused = takes_fused_kernels(received.local_ids.device)
        kind = FusedExpansion if fused else PlainExpansion
        # Counts, the number of tokens and their place, in one copy. From memory that is not pinned the host waits.
        numbers = torch.tensor([*rows_per_expert, len(received.local_ids), 0])
        if received.local_ids.device.type == "cuda":
            numbers = numbers.pin_memory()
        numbers = numbers.to(received.local_ids.device, non_blocking=True)
        counts, tokens, order = numbers.split((len(rows_per_expert), 1, 1))
        arrivals = Arrivals(received.local_ids, received.weights, counts.unsqueeze(0), tokens, order, received.arrival)
        self._expansion = kind(arrivals, rows_per_expert, 0, self._dispatcher.options.alignment)
        return self._expansion

    def _count(self, purpose: str, unit: int) -> None:
        if self._crossings is not None:
            assert self._dispatcher.meter is not None
            self._crossings.count(self._dispatcher.meter, purpose, unit)


def _row_bytes(payload: Payload) -> int:
    parts = (payload,) if isinstance(payload, Tensor) else payload
    return sum(part.shape[1] * part.element_size() for part in parts)
