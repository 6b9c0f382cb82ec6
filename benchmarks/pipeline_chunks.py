"""Stages that sleep instead of computing, for the pipeline executor and for torch.distributed.pipelining.

What passes between them is real, and so are the gradients; only the time is made up. It is counted in units, of which
a `Clock` says how long they are: F, I and W take one each, and a pair of an F and a B two and a half.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from counterflow.phases import Phases, Tape, Uncut, WeightQueue

FORWARD = BACKWARD_INPUT = BACKWARD_WEIGHT = 1.0
OVERLAPPED = 2.5
COSTS = {
    "forward": FORWARD,
    "backward_input": BACKWARD_INPUT,
    "backward_weight": BACKWARD_WEIGHT,
    "overlapped": OVERLAPPED,
}
"""The same as keywords of `Costs.uniform`."""
HIDDEN = FORWARD + BACKWARD_INPUT + BACKWARD_WEIGHT - OVERLAPPED
TRANSFER = HIDDEN / 4
"""Each of the all-to-alls, two in a forward and two in a backward, that only a pair hides."""
SHAPE = torch.Size((1, 128, 512))
"""Of what passes between stages, `[B, S, H]`, FP32."""


class Clock:
    """The time, in units of `unit` seconds."""

    def __init__(self, unit: float) -> None:
        self.unit = unit

    def now(self) -> float:
        return time.perf_counter() / self.unit

    def sleep(self, duration: float) -> None:
        time.sleep(duration * self.unit)


def sleep_exactly() -> None:
    """Ask Linux to end this thread's sleeps on time: it may end each up to 50 microseconds late otherwise."""
    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, ctypes.c_ulong(1), 0, 0, 0)


class SleepingChunk(nn.Module):
    """A stage of one MoE layer for the executor: a bias is added in `attention`, another one in `experts`.

    The first stage's input is the micro-batch itself, the last stage's result the mean of its output.
    """

    def __init__(self, stage: int, num_stages: int, clock: Clock) -> None:
        super().__init__()
        self.last = stage == num_stages - 1
        self.clock = clock
        self.weight_queue = WeightQueue()
        self.attention_bias, self.experts_bias = (nn.Parameter(torch.zeros(SHAPE[-1])) for _ in range(2))

    def phases(self, micro_batch: Tensor, x: Tensor | None, tape: Uncut | Tape) -> Phases:
        x = micro_batch if x is None else x
        dispatch, combine = _AllToAll(self.clock), _AllToAll(self.clock)
        yield tape.phase("attention")
        x = tape.cut(_Compute.apply(x, self.attention_bias, self))
        yield tape.phase("dispatch")
        x = tape.cut(_Launch.apply(x, dispatch))
        yield tape.phase("experts")
        x = tape.cut(_Compute.apply(_Wait.apply(x, dispatch), self.experts_bias, self))
        yield tape.phase("combine")
        x = tape.cut(_Launch.apply(x, combine))
        yield tape.phase("finish")
        x = _Wait.apply(x, combine)
        if self.last:
            return None, tape.seed(x.mean(), 1.0)
        return tape.leave(x), None


class _AllToAll:
    """A transfer that takes its time beside whatever is computed, as an asynchronous collective does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.done_at = 0.0

    def launch(self) -> None:
        self.done_at = self.clock.now() + TRANSFER

    def wait(self) -> None:
        left = self.done_at - self.clock.now()
        if left > 0:
            self.clock.sleep(left)


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
    """Half of a chunk's computation; the weight gradient at once, or later if the queue is deferring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: nn.Parameter, chunk: SleepingChunk) -> Tensor:
        ctx.bias, ctx.chunk = bias, chunk
        chunk.clock.sleep(FORWARD / 2 - TRANSFER)
        return x + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), chunk = gradients, ctx.chunk
        chunk.clock.sleep(BACKWARD_INPUT / 2 - TRANSFER)
        work = partial(_add_weight_gradient, chunk.clock, ctx.bias, gradient)
        if chunk.weight_queue.deferring:
            chunk.weight_queue.put(work)
        else:
            work()
        return gradient, None, None


def _add_weight_gradient(clock: Clock, bias: nn.Parameter, gradient: Tensor) -> None:
    clock.sleep(BACKWARD_WEIGHT / 2)
    total = gradient.sum((0, 1))
    bias.grad = total if bias.grad is None else bias.grad.add_(total)


class SleepingModule(nn.Module):
    """A stage for torch.distributed.pipelining, as a plain module whose backward can be split in I and W.

    It sleeps as often as the other one does, since every sleep ends a little late. torch runs the parts of a pair one
    after the other, whatever a model could overlap. To give its pairs the same cost the F of a pair sleeps less; that
    the B's input need not be there before is to torch's advantage.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.bias = nn.Parameter(torch.zeros(SHAPE[-1]))
        self.paired: set[int] = set()
        """The micro-batches whose F at this stage is a part of a pair."""
        self.next_microbatch = 0
        """Whose F comes next; the forwards of a step run in order. To be set to 0 before each step."""

    def forward(self, x: Tensor) -> Tensor:
        paired = self.next_microbatch in self.paired
        self.next_microbatch += 1
        for piece in 2 * (((FORWARD - HIDDEN) / 2,) if paired else (FORWARD / 2 - TRANSFER, TRANSFER)):
            self.clock.sleep(piece)
        if not x.requires_grad:  # the pipeline's input, but the first stage's I takes its time all the same
            x = x.detach().requires_grad_()
        # The sum keeps the ways to the input and to the weight apart, so that each can be gone by itself.
        backward_input = 2 * (BACKWARD_INPUT / 2 - TRANSFER, TRANSFER)
        backward_weight = 2 * (BACKWARD_WEIGHT / 2,)
        x = _SleepInBackward.apply(x, self.clock, backward_input)
        return x + _SleepInBackward.apply(self.bias, self.clock, backward_weight)


class _SleepInBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, pieces: Sequence[float]) -> Tensor:
        ctx.clock, ctx.pieces = clock, pieces
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        for piece in ctx.pieces:
            ctx.clock.sleep(piece)
        return gradients[0], None, None
