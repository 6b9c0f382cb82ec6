"""Activations and gradients between pipeline ranks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .meter import Meter


class PipelineChannels:
    """Sends and receives of one pipeline rank.

    Every ordered pair of ranks has a group of its own. On NCCL the transfers of a group queue one behind the other,
    whichever ranks they connect: in a group of all ranks a send would wait behind a receive that may depend on it.
    NCCL has no tags, so a pair must receive in the order in which it sends.

    Args:
        rank: this pipeline rank.
        channels: the group of two ranks, by source and target.
        meter: counts what is sent.
    """

    def __init__(
        self, rank: int, channels: Mapping[tuple[int, int], dist.ProcessGroup], meter: Meter | None = None
    ) -> None:
        self.rank = rank
        self._channels = channels
        self._meters = {} if meter is None else {pair: meter.group(group) for pair, group in channels.items()}

    def send(self, tensor: Tensor, target: int) -> Transit:
        """Start sending `tensor`, which must not change until the transit is over, to pipeline rank `target`."""
        whole = tensor.contiguous()
        if self._meters:
            self._meters[self.rank, target].send("pipeline", int(target > self.rank), whole.nbytes)
        # Calls the group's own method: the checks of dist.isend take longer than all the rest, and every rank waits.
        return Transit(whole, self._group(self.rank, target).send([whole], int(target > self.rank), 0))

    def receive(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: int) -> Transit:
        """Start receiving from pipeline rank `source`."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        return Transit(buffer, self._group(source, self.rank).recv([buffer], int(source > self.rank), 0))

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        assert (source, target) in self._channels, f"no channel from pipeline rank {source} to {target} was made"
        return self._channels[source, target]


class Transit:
    """Transfer of one tensor from or to this rank; keeps the tensor until the transfer is over."""

    def __init__(self, tensor: Tensor, work: dist.Work) -> None:
        self._tensor = tensor
        self._work = work

    def wait(self) -> Tensor:
        self._work.wait()
        return self._tensor
