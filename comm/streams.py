"""Streams of a GPU beside the one that computes, and small results that are read on the host. Other devices have none.

Memory belongs to the stream for which it was allocated: the one that computes. A tensor that another stream uses is
recorded there (`record_stream`) if it may be freed first, so that its memory is not used again before that stream is
done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..kernels.launch import launch_stream, launched_on

Purpose = Literal["relay", "counts"]


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Context whose fused kernels and exchanges run beside those that compute; without effect where there is no GPU.

    They begin after all that was launched before, and then run ahead of the work that computes. New tensors get memory
    of the current stream, which is free by then.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device, "relay")
    stream.wait_stream(torch.cuda.current_stream(device))
    with launched_on(stream):
        yield


def on_launch_stream(device: torch.device) -> AbstractContextManager[object]:
    """Context in which the stream of `beside`, if there is one, is the current stream."""
    stream = launch_stream() if device.type == "cuda" else None
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def lend(*tensors: Tensor) -> None:
    """Record that the stream of `beside`, if there is one, uses these tensors, which may be freed before it does."""
    stream = launch_stream()
    for tensor in tensors:
        if stream is not None and tensor.device.type == "cuda":
            tensor.record_stream(stream)


@cache
def _stream(device: torch.device, purpose: Purpose) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


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
