"""Streams of a GPU beside the one that computes, and small results that are read on the host. Other devices have none.

Memory belongs to the stream that allocated it. A tensor that another stream uses is recorded there (`record_stream`),
so that its memory is not used again before that stream is done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal["relay", "counts"]


def beside(device: torch.device, purpose: Purpose) -> AbstractContextManager[object]:
    """Context whose kernels run on the stream of this purpose, ahead of those that compute; nothing without a GPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_stream(device, purpose))


@cache
def _stream(device: torch.device, purpose: Purpose) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class Owner:
    """Stream whose memory new tensors of a device get; none without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def lend(self, *tensors: Tensor) -> None:
        """Record that the current stream uses these tensors of the owner's memory, if it is another stream.

        Once they are freed, their memory is used again only after all that the current stream has to do until then.
        """
        if self._stream is None:
            return
        user = torch.cuda.current_stream(self._device)
        if user != self._stream:
            for tensor in tensors:
                tensor.record_stream(user)


class OnItsWay:
    """Numbers that the host will read: they are exchanged and copied while the computing stream continues.

    On a GPU the copy to pinned memory runs on a stream of its own. The host then waits for the numbers alone, and not
    for the work that was launched after them.

    Args:
        device: device of the numbers.
        numbers: function that waits for the exchange and returns the numbers; called once. The caller keeps what is
            exchanged alive until `wait`.
    """

    def __init__(self, device: torch.device, numbers: Callable[[], Tensor]) -> None:
        self._numbers = numbers
        self._landed: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._begin(device)

    def _begin(self, device: torch.device) -> None:
        stream = _stream(device, "counts")
        stream.wait_stream(torch.cuda.current_stream(device))  # for numbers that no exchange brings
        with torch.cuda.stream(stream):
            numbers = self._numbers()
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        self._landed = numbers, host, event

    def wait(self) -> Tensor:
        """Return the numbers, in the host's memory if their device is a GPU."""
        if self._landed is None:
            return self._numbers()
        _, host, event = self._landed
        event.synchronize()
        self._landed = None
        return host
