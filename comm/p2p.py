"""Activations and gradients between pipeline ranks, one tensor at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Wires:
    """Sends and receives of one pipeline rank.

    Messages to higher ranks and to lower ranks use groups of their own: on NCCL a group's transfers between two ranks
    queue in one stream, where opposite directions would wait for each other. Within a direction a pair of ranks must
    receive in the order in which it sends, for NCCL knows no tags.

    Args:
        down: the pipeline ranks in order, for messages from lower to higher ranks.
        up: the same ranks, for messages from higher to lower ranks.
    """

    def __init__(self, down: dist.ProcessGroup, up: dist.ProcessGroup) -> None:
        self._down, self._up = down, up
        self.rank = down.rank()

    def send(self, tensor: Tensor, target: int) -> dist.Work:
        """Start sending `tensor`, which must not change until the work is done, to pipeline rank `target`."""
        work = dist.isend(tensor.contiguous(), group=self._group(self.rank, target), group_dst=target)
        assert work is not None
        return work

    def receive(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: int) -> Received:
        """Start receiving from pipeline rank `source`."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(buffer, group=self._group(source, self.rank), group_src=source)
        assert work is not None
        return Received(buffer, work)

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        return self._down if source < target else self._up


class Received:
    """A tensor on its way here."""

    def __init__(self, buffer: Tensor, work: dist.Work) -> None:
        self._buffer = buffer
        self._work = work

    def wait(self) -> Tensor:
        self._work.wait()
        return self._buffer
