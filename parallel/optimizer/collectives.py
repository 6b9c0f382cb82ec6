"""Collectives of the sharded optimizer on gradients and weights, launched and counted.

Each of R ranks with shards of S elements sends (R - 1) S elements in a reduction, in the format of `optim.reduce`, and
equally many in an all-gather, in the format of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...comm.errors import comm_errors
from ...comm.exchange import begin_all_to_all
from ...comm.meter import GroupMeter

# As of torch 2.13 these functions have new names, and the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collective:
    """A collective in flight. Its memory is kept alive until `wait`, which is called once and returns the result.

    On a GPU `wait` blocks the current stream, not the host. Waiting launches nothing, so the order of waits is free.
    """

    def __init__(
        self, name: Callable[[], str], works: Sequence[dist.Work], sent: Tensor, result: Callable[[], Tensor]
    ) -> None:
        """`name` is called for errors; `result` is called in `wait`, once `works` are done."""
        self._name, self._works = name, works
        self._sent, self._result = sent, result

    @property
    def done(self) -> bool:
        """Whether a GPU has done the work, so that `wait` holds nothing up. Always False on CPUs, where it is waited
        for at the last moment: gloo's sends do not say when they end."""
        return self._sent.device.type != "cpu" and all(work.is_completed() for work in self._works)

    def wait(self) -> Tensor:
        """Return the result. Raises CommunicationError if a participating rank has died or is too late."""
        with comm_errors(self._name):
            for work in self._works:
                work.wait()
        return self._result()


def begin_reduce_scatter(pieces: Tensor, into: Tensor, group: dist.ProcessGroup, meter: GroupMeter) -> Collective:
    """Sum the ranks' pieces for this one: row r of `pieces` `[R, S]` goes to rank r; `into` `[S]`, FP32, gets the sum.

    FP32 pieces are summed by reduce-scatter. Other formats are exchanged and added up here, in FP32 and in the order of
    the ranks: a reduce-scatter in BF16 would round every partial sum on its way, and with many ranks lose small
    contributions altogether. Either way a rank sends R - 1 of its R pieces.

    On CPUs FP32 pieces are exchanged too: gloo's reduce-scatter is an all-reduce inside and sends twice the bytes.
    """

    def name() -> str:
        return f"the reduction of gradients over {_ranks(group)}"

    shard = pieces.shape[1] * pieces.element_size()
    if pieces.dtype == torch.float32 and pieces.device.type != "cpu":
        meter.reduce_scatter("gradients", shard)
        with comm_errors(name):
            work = _reduce_scatter(into, pieces.view(-1), group=group, async_op=True)
        assert work is not None
        return Collective(name, [work], pieces, lambda: into)
    received, rows = torch.empty_like(pieces), [1] * len(pieces)
    meter.all_to_all("gradients", rows, shard)
    with comm_errors(name):
        works = begin_all_to_all(received, pieces, rows, rows, group)
    return Collective(name, works, pieces, lambda: _add_up(received, into))


def begin_all_gather(shard: Tensor, group: dist.ProcessGroup, meter: GroupMeter) -> Collective:
    """Gather every rank's `shard` `[S]` on every rank, as `[R, S]`. `shard` must not change until the wait."""
    gathered = shard.new_empty(group.size(), shard.numel())
    meter.all_gather("weights", shard.nbytes)

    def name() -> str:
        return f"the all-gather of weights over {_ranks(group)}"

    with comm_errors(name):
        work = _all_gather(gathered.view(-1), shard, group=group, async_op=True)
    assert work is not None
    return Collective(name, [work], shard, lambda: gathered)


def _add_up(pieces: Tensor, into: Tensor) -> Tensor:
    """Sum the rows of `pieces`, from the first to the last, in the FP32 of `into`."""
    into.copy_(pieces[0])
    for piece in pieces[1:]:
        into.add_(piece)
    return into


def _ranks(group: dist.ProcessGroup) -> str:
    ranks = dist.get_process_group_ranks(group)
    return f"ranks {', '.join(map(str, ranks))}" if len(ranks) <= 16 else f"{len(ranks)} ranks from {ranks[0]}"
