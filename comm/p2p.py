"""Activations and gradients between pipeline ranks, one tensor at a time.

Gloo sends and receives memory of the host only. Tensors of a GPU pass through pinned memory there, which lets several
ranks share one GPU. Gloo's all-to-all, all-gather, all-reduce and reduce-scatter take tensors of a GPU: torch stages
these itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .meter import Meter


def needs_staging(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether the group can send and receive tensors of this device only by way of the host's memory."""
    return device.type == "cuda" and dist.get_backend(group) == "gloo"


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
        whole, group = tensor.contiguous(), self._group(self.rank, target)
        if self._meters:
            self._meters[self.rank, target].send("pipeline", int(target > self.rank), whole.nbytes)
        sent = whole
        if needs_staging(whole.device, group):
            sent = _on_host(whole.shape, whole.dtype, whole.device).copy_(whole)  # the host waits for the copy
        # Calls the group's own method: the checks of dist.isend take longer than all the rest, and every rank waits.
        return Transit(sent, group.send([sent], int(target > self.rank), 0))

    def receive(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: int) -> Transit:
        """Start receiving from pipeline rank `source`."""
        group, onto = self._group(source, self.rank), None
        if needs_staging(device, group):
            buffer, onto = _on_host(shape, dtype, device), device
        else:
            buffer = torch.empty(shape, dtype=dtype, device=device)
        return Transit(buffer, group.recv([buffer], int(source > self.rank), 0), onto)

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        assert (source, target) in self._channels, f"no channel from pipeline rank {source} to {target} was made"
        return self._channels[source, target]


class Transit:
    """Transfer of one tensor from or to this rank; keeps the tensor until the transfer is over.

    `onto` is the device to which a received tensor is copied once it is here, if it was received elsewhere.
    """

    def __init__(self, tensor: Tensor, work: dist.Work, onto: torch.device | None = None) -> None:
        self._tensor = tensor
        self._work = work
        self._onto = onto

    def wait(self) -> Tensor:
        self._work.wait()
        if self._onto is None:
            return self._tensor
        # Torch keeps pinned memory until the copies that it knows of have ended.
        return self._tensor.to(self._onto, non_blocking=True)


def _on_host(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
