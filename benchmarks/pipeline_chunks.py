"""Stages that sleep instead of computing, for the pipeline executor and for torch.distributed.pipelining.

Transfers between stages, and gradients, are real; only the time of computation is emulated. Time is counted in units,
whose length a `Device` defines: F, I and W take one unit each, and a pair of an F and a B 2.5 units.
"""

from __future__ import annotations

import ctypes
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from counterflow.phases import Phases, Tape, Uncut
from counterflow.weight_gradients import WeightQueue

FORWARD = BACKWARD_INPUT = BACKWARD_WEIGHT = 1.0
OVERLAPPED = 2.5
COSTS = {
    "forward": FORWARD,
    "backward_input": BACKWARD_INPUT,
    "backward_weight": BACKWARD_WEIGHT,
    "overlapped": OVERLAPPED,
}
"""Keywords of `Costs.uniform` for the same costs."""
HIDDEN = FORWARD + BACKWARD_INPUT + BACKWARD_WEIGHT - OVERLAPPED
TRANSFER = HIDDEN / 4
"""Duration of an all-to-all, of which a forward and a backward have two each; only a pair hides them."""
FORWARD_HALF = FORWARD / 2 - TRANSFER
BACKWARD_INPUT_HALF = BACKWARD_INPUT / 2 - TRANSFER
BACKWARD_WEIGHT_HALF = BACKWARD_WEIGHT / 2
"""Computation before the experts' all-to-all, and equally much after it."""
SHAPE = torch.Size((1, 128, 512))
"""Shape of tensors between stages, `[B, S, H]`, FP32."""


class Device:
    """Emulated GPU as its host sees it: it computes in order, transfers at the same time, and can be waited for.

    Durations are in units of `unit` seconds, points in time in seconds.
    """

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.free_at = 0.0

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def compute(self, duration: float) -> None:
        """Compute once all earlier work has ended."""
        self.free_at = max(self.free_at, self.now()) + duration * self.unit

    def transfer(self, duration: float) -> float:
        """Transfer once all earlier work has ended, in parallel with later computation; return the time of the end."""
        return max(self.free_at, self.now()) + duration * self.unit

    def wait_for(self, point: float) -> None:
        """Delay later computation to the time `point`."""
        self.free_at = max(self.free_at, point)

    def synchronize(self) -> None:
        """Block the host until all work has ended."""
        left = self.free_at - self.now()
        if left > 0:
            self.sleep(left)


def sleep_exactly() -> None:
    """Make Linux end this thread's sleeps on time; by default each may end up to 50 microseconds late."""
    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, ctypes.c_ulong(1), 0, 0, 0)


class SleepingChunk(nn.Module):
    """A stage of one MoE layer for the executor: a bias is added in `attention`, another one in `experts`.

    The first stage's input is the micro-batch itself, the last stage's result the mean of its output. The host waits
    for the device when an output, a gradient or the weight gradients are needed, as a send over gloo does.
    """

    def __init__(self, stage: int, num_stages: int, device: Device) -> None:
        super().__init__()
        self.last = stage == num_stages - 1
        self.device = device
        self.weight_queue = WeightQueue()
        self.attention_bias, self.experts_bias = (nn.Parameter(torch.zeros(SHAPE[-1])) for _ in range(2))

    def phases(self, micro_batch: Tensor, x: Tensor | None, tape: Uncut | Tape) -> Phases:
        x = micro_batch if x is None else x
        dispatch, combine = _AllToAll(self.device), _AllToAll(self.device)
        yield tape.phase("attention")
        x = tape.cut(_Compute.apply(x, self.attention_bias, self, True))
        yield tape.phase("dispatch")
        x = tape.cut(_Launch.apply(x, dispatch))
        yield tape.phase("experts")
        x = tape.cut(_Compute.apply(_Wait.apply(x, dispatch), self.experts_bias, self, False))
        yield tape.phase("combine")
        x = tape.cut(_Launch.apply(x, combine))
        yield tape.phase("finish")
        x = _Wait.apply(x, combine)
        self.device.synchronize()
        if self.last:
            return None, tape.seed(x.mean(), 1.0)
        return tape.leave(x), None


class _AllToAll:
    """A transfer and, in the backward, the transfer of its gradients."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.done_at = 0.0

    def launch(self) -> None:
        self.done_at = self.device.transfer(TRANSFER)

    def wait(self) -> None:
        self.device.wait_for(self.done_at)


class _Launch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: _AllToAll) -> Tensor:
        ctx.transfer = transfer
        transfer.launch()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.wait()
        return gradients[0], None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: _AllToAll) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch()
        return gradients[0], None


class _Compute(Function):
    """Half of a chunk's computation. In the backward the `first` half comes last, and the host waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: nn.Parameter, chunk: SleepingChunk, first: bool) -> Tensor:
        ctx.bias, ctx.chunk, ctx.first = bias, chunk, first
        chunk.device.compute(FORWARD_HALF)
        return x + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), chunk = gradients, ctx.chunk
        chunk.device.compute(BACKWARD_INPUT_HALF)
        work = partial(_add_weight_gradient, chunk.device, ctx.bias, gradient, ctx.first)
        if chunk.weight_queue.deferring:
            chunk.weight_queue.put(work)
            if ctx.first:
                chunk.device.synchronize()
        else:
            work()
        return gradient, None, None, None


def _add_weight_gradient(device: Device, bias: nn.Parameter, gradient: Tensor, last: bool) -> None:
    device.compute(BACKWARD_WEIGHT_HALF)
    total = gradient.sum((0, 1))
    bias.grad = total if bias.grad is None else bias.grad.add_(total)
    if last:
        device.synchronize()


class SleepingModule(nn.Module):
    """A stage for torch.distributed.pipelining, as a plain module whose backward can be split in I and W.

    torch runs the parts of a pair one after the other, although a model could overlap them. To give its pairs the same
    cost, the F of a pair takes less. The B's input need not be there before this F, which is to torch's advantage.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.bias = nn.Parameter(torch.zeros(SHAPE[-1]))
        self.paired: set[int] = set()
        """Micro-batches whose F at this stage is a part of a pair."""
        self.next_microbatch = 0
        """Micro-batch of the next F; the forwards of a step run in order. Set it to 0 before each step."""

    def forward(self, x: Tensor) -> Tensor:
        self.device.compute(FORWARD - (HIDDEN if self.next_microbatch in self.paired else 0.0))
        self.next_microbatch += 1
        if not x.requires_grad:  # the pipeline's input, but the first stage's I takes its time too
            x = x.detach().requires_grad_()
        # The sum separates the paths to the input and to the weight, so that the backward of each can run alone.
        x = _SleepInBackward.apply(x, self.device, BACKWARD_INPUT)
        x = x + _SleepInBackward.apply(self.bias, self.device, BACKWARD_WEIGHT)
        self.device.synchronize()
        return x


class _SleepInBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device, duration: float) -> Tensor:
        ctx.device, ctx.duration = device, duration
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.device.compute(ctx.duration)
        ctx.device.synchronize()
        return gradients[0], None, None
