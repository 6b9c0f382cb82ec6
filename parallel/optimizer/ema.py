"""The moving average of the weights: in CPU memory, updated while the next step computes.

DeepSeek-V3 keeps an exponential moving average of its parameters, to estimate early how the model will perform once the
learning rate has decayed, "in CPU memory" and "updated asynchronously after each training step" (V3 §3.2.3). The
average costs a GPU neither memory nor time. V3 does not publish the decay.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Ema:
    """The average over steps of flat FP32 tensors, the `weights`, that are rewritten once a step.

    After n updates with values w_1 … w_n the average is sum(decay^(n-i) w_i) / sum(decay^(n-i)), a mean of the values
    after each step. The initial weights do not count, so the first update makes the average equal to the weights. In
    the long run the average spans 1 / (1 - decay) steps.

    The caller calls `release` before it rewrites the weights and `update` afterwards. After `update` the weights are
    read: on a GPU by a copy on a separate stream, while a thread does the arithmetic. Step and thread do not wait for
    each other unless an update takes longer than a step. Weights in CPU memory are averaged at once: that takes 0.3 %
    of a step of the smoke run, and a thread, which competes for the same cores, gains nothing measurable.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, background: bool | None = None) -> None:
        """Keep references to `weights`, all on one device. `background` forces the thread, or its absence."""
        on_gpu = bool(weights) and weights[0].device.type == "cuda"
        self.decay = decay
        self.updates = 0
        """Steps in the average."""
        self._weights = list(weights)
        # A dry run counts the memory of the device; the average would lie in the host's.
        on_meta = bool(weights) and weights[0].device.type == "meta"
        self._shards = self._weights if on_meta else _parts(_zeros(weights), weights)
        self._copy = DeviceCopy(self._weights) if on_gpu else None
        # A new thread is on GPU 0, and the first call there would make a context on it for every rank of the node.
        enter = partial(torch.cuda.set_device, weights[0].device) if on_gpu else None
        in_thread = on_gpu if background is None else background
        self._thread = ThreadPoolExecutor(1, "ema", enter) if in_thread else None
        self._pending: Future[None] | None = None

    @torch.no_grad()
    def restart(self, updates: int) -> None:
        """Set the average to the weights, which count as `updates` steps of it (0: as none)."""
        self.finish()
        for shard, weight in zip(self._shards, self._weights, strict=True):
            shard.copy_(weight)
        self.updates = updates

    def release(self) -> None:
        """Make it safe to rewrite the weights; on a GPU by work that the current stream gets after this."""
        if self._copy is not None:
            self._copy.hold_back_writers()
        else:
            self.finish()

    def update(self) -> None:
        """Add the weights after a step to the average; on a GPU as the current stream leaves them."""
        self.finish()  # its result and the memory of the copy are needed
        self.updates += 1
        if self._copy is not None:
            self._copy.start()
        share = share_of_newest(self.decay, self.updates)
        if self._thread is None:
            self._average(share)
        else:
            self._pending = self._thread.submit(self._average, share)

    def finish(self) -> None:
        """Wait for the update that is running. Raises its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def shards(self) -> list[Tensor]:
        """The average of each of the weights: the tensors themselves, FP32 in CPU memory, until the next `update`."""
        self.finish()
        return self._shards

    @torch.no_grad()
    def _average(self, share: float) -> None:
        if self._shards is self._weights:  # on the meta device
            return
        newest = self._weights if self._copy is None else self._copy.wait()
        for shard, weight in zip(self._shards, newest, strict=True):
            shard.lerp_(weight, share)


def share_of_newest(decay: float, updates: int) -> float:
    """Share of the newest value in an average of `updates` values: 1, 1 / (1 + decay), … down to 1 - decay."""
    return (1.0 - decay) / (1.0 - decay**updates)


class DeviceCopy:
    """Copies of GPU tensors in pinned memory, made on a separate stream. Only `wait` blocks the calling thread.

    The copies are one block of ordinary memory that is pinned afterwards: PyTorch's own allocator of pinned memory
    rounds every tensor up to a power of two.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        block, runtime = _zeros(tensors), torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
        weakref.finalize(self, _unpin, runtime, block).atexit = False  # the system frees all at a process's end
        self._copies = _parts(block, tensors)
        self._device = tensors[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._done = torch.cuda.Event(blocking=True)  # blocking: a waiting thread sleeps and frees its core

    def start(self) -> None:
        """Copy the tensors as the current stream leaves them. The previous copies must no longer be in use."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._done.record(self._stream)

    def hold_back_writers(self) -> None:
        """Make later work on the current stream begin only after the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def wait(self) -> list[Tensor]:
        """The copies, once they are complete."""
        self._done.synchronize()
        return self._copies


def _unpin(runtime: Any, block: Tensor) -> None:
    runtime.cudaHostUnregister(block.data_ptr())


def _zeros(tensors: Sequence[Tensor]) -> Tensor:
    """Zeros in CPU memory, FP32, as many as the tensors have elements together."""
    return torch.zeros(sum(tensor.numel() for tensor in tensors), device="cpu")


def _parts(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat block in the shapes of `tensors`, one after another."""
    parts = block.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
