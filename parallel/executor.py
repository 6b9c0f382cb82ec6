"""Execution of a pipeline rank's part of any schedule.

Before each action the executor posts the sends and receives that `plan_transfers` derived, waits for the action's
inputs, and runs the chunk's phases. Ranks negotiate nothing, since shapes are known.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..comm.errors import CommunicationError, comm_errors
from ..comm.p2p import PipelineChannels, Transit
from ..phases import Chunk, Phases, Tape, Uncut, run
from ..weight_gradients import drain
from .overlap import run_pair
from .schedule.actions import Action, Overlap, Schedule, parts
from .schedule.check import check
from .schedule.timeline import Span
from .schedule.transfers import Boundary, Transfer, plan_transfers

SENDS_IN_FLIGHT = 4
"""Sends that a rank may have in flight: enough for late receivers, and a bound on the memory that they hold."""


class PipelineError(RuntimeError):
    """A failed transfer; the message names the ranks and the tensor."""


class Watch(Protocol):
    """Observer of a step."""

    def begin(self, action: Action | Overlap) -> None:
        """Note an action that is about to run."""

    def end(self, action: Action | Overlap) -> None:
        """Note that the action has run."""

    def phase(self, side: str, name: str | None) -> None:
        """Note that a phase of a forward (`side` F) or of a backward (B) begins, or ends (`name` None).

        Forwards inside a phase of a backward are recomputation.
        """


class Executed(NamedTuple):
    """Results and times of one rank's part of a step."""

    results: list[Any]
    """Results of the chunks, in the order of their forwards."""
    spans: list[Span]
    """Begin and end of each action, in seconds of `time.perf_counter`."""


@dataclass(frozen=True)
class Program:
    """Part of a checked schedule that one rank runs."""

    rank: int
    actions: tuple[Action | Overlap, ...]
    boundaries: tuple[Boundary, ...]
    num_stages: int
    peak_microbatches: int

    @classmethod
    def of(cls, schedule: Schedule, rank: int, training: bool = True) -> Program:
        """Check `schedule` and take the part of `rank`; `training` False is for forwards only. Raises ScheduleError."""
        peak = check(schedule, training).peak[rank]
        return cls(rank, schedule.actions[rank], plan_transfers(schedule)[rank], schedule.num_stages, peak)


@dataclass
class _Pass:
    """A micro-batch at a stage, from its F to its W."""

    tape: Tape | None = None
    deferred: deque[Callable[[], None]] = field(default_factory=deque)


Result = TypeVar("Result")

_Ended = tuple[Tensor | None, None]  # returned by a backward
_Key = tuple[str, int, int]  # activation or gradient, the stage that made it, micro-batch: the head of a Transfer


class Executor:
    """Runner of programs on the chunks of one rank.

    Args:
        chunks: by stage.
        channels: channels to the other pipeline ranks.
        order: order of the phases of an overlapped pair, see `overlap.py`.
        shape: `[B, S, H]` of tensors between stages.
        after_phase: called after each phase; dispatchers of several hops launch the next hop there.
    """

    def __init__(
        self,
        chunks: Mapping[int, Chunk],
        channels: PipelineChannels,
        order: Sequence[str],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        after_phase: Callable[[], None] | None = None,
    ) -> None:
        self.chunks = chunks
        self.channels = channels
        self.order = order
        self.buffer = shape, dtype, device
        self.after_phase = after_phase

    def train(
        self, program: Program, micro_batches: Sequence[Any], timed: bool = False, watch: Watch | None = None
    ) -> Executed:
        """Run forward and backward of all micro-batches.

        `timed` waits for a GPU around every action, so that the spans are the GPU's times, not the host's.
        """
        run = _Run(self, program, micro_batches, timed, watch)
        results = run.run()
        assert run.peak == program.peak_microbatches, (run.peak, program.peak_microbatches)
        return Executed(results, run.spans)

    @torch.no_grad()
    def evaluate(self, program: Program, micro_batches: Sequence[Any]) -> list[Any]:
        """Run a program of forwards only; returns the chunks' results in the order of their forwards."""
        return _Run(self, program, micro_batches, timed=False, watch=None).run()


class _Run:
    """The state of one step."""

    def __init__(
        self, executor: Executor, program: Program, micro_batches: Sequence[Any], timed: bool, watch: Watch | None
    ) -> None:
        self.executor, self.program, self.micro_batches = executor, program, micro_batches
        self.timed, self.watch = timed, watch
        self.results: list[Any] = []
        self.spans: list[Span] = []
        self.peak = 0
        """The largest number of (stage, micro-batch) with activations at the same time."""
        self._live: dict[tuple[int, int], _Pass] = {}
        self._made: dict[_Key, Tensor] = {}
        self._arriving: dict[_Key, Transit] = {}
        self._sending: deque[tuple[Transfer, Transit]] = deque()

    def run(self) -> list[Any]:
        actions = self.program.actions
        for action, boundary in zip(actions, self.program.boundaries, strict=False):
            self._post(boundary)
            self._await(boundary, action)
            if self.watch is not None:
                self.watch.begin(action)
            start = self._clock()
            with self._error_context("in {}".format, action):
                self._perform(action)
            if self.watch is not None:
                self.watch.end(action)
            self.spans.append(Span(action, start, self._clock()))
        self._post(self.program.boundaries[len(actions)])
        while self._sending:
            self._finish_send()
        assert not (self._live or self._made or self._arriving), "the schedule left something unused"
        return self.results

    def _clock(self) -> float:
        device = self.executor.buffer[2]
        if self.timed and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    # Transfers between ranks

    def _post(self, boundary: Boundary) -> None:
        channels = self.executor.channels
        for transfer in boundary.sends:  # sends come first, because another rank waits for them
            tensor = self._made.pop(transfer[:3])
            with self._error_context(_describe_send, transfer), comm_errors("beginning to send"):
                self._sending.append((transfer, channels.send(tensor, transfer.target)))
        for transfer in boundary.receives:
            with self._error_context(_describe_receive, transfer), comm_errors("beginning to receive"):
                self._arriving[transfer[:3]] = channels.receive(*self.executor.buffer, transfer.source)
        while len(self._sending) > SENDS_IN_FLIGHT:
            self._finish_send()

    def _await(self, boundary: Boundary, action: Action | Overlap) -> None:
        for transfer in boundary.needs:
            arriving = self._arriving.pop(transfer[:3])
            with (
                self._error_context(lambda t: f"{_describe_receive(t)}, to run {action}", transfer),
                comm_errors("receiving"),
            ):
                self._made[transfer[:3]] = arriving.wait()

    def _finish_send(self) -> None:
        transfer, sent = self._sending.popleft()
        with self._error_context(_describe_send, transfer), comm_errors("sending"):
            sent.wait()

    @contextmanager
    def _error_context(self, describe: Callable[[Any], str], doing: Any) -> Iterator[None]:
        try:
            yield
        except CommunicationError as error:
            raise PipelineError(f"pipeline rank {self.program.rank} {describe(doing)}: {error}") from error

    # Actions

    def _perform(self, action: Action | Overlap) -> None:
        if isinstance(action, Overlap):
            self._overlap(action)
        elif action.kind == "F":
            self._end_forward(action, run(self._forward(action), self.executor.after_phase))
        elif action.kind == "W":
            drain(self._live.pop((action.stage, action.microbatch)).deferred)
        else:
            deferred = self._live[action.stage, action.microbatch].deferred if action.kind == "I" else None
            gradient, _ = run(self._backward(action, deferred), self.executor.after_phase)
            self._end_backward(action, gradient)

    def _overlap(self, action: Overlap) -> None:
        forward, backward = action
        # With a B the weight gradients fill the gaps of this pair and end with it; with an I they wait for their W.
        queue: deque[Callable[[], None]] = deque()
        deferred = queue if backward.kind == "B" else self._live[backward.stage, backward.microbatch].deferred
        sides = self._forward(forward), self._backward(backward, deferred)
        made, (gradient, _) = run_pair(*sides, queue, self.executor.order, self.executor.after_phase)
        drain(queue)
        self._end_forward(forward, made)
        self._end_backward(backward, gradient)

    def _forward(self, action: Action) -> Phases:
        chunk, micro_batch = self.executor.chunks[action.stage], self.micro_batches[action.microbatch]
        x = self._made.pop(("activation", action.stage - 1, action.microbatch), None)
        assert (x is None) == (action.stage == 0), f"{action} has no input"
        if not torch.is_grad_enabled():
            return chunk.phases(micro_batch, x, Uncut())
        tape = Tape()
        self._live[action.stage, action.microbatch] = _Pass(tape)
        self.peak = max(self.peak, len(self._live))
        phases = chunk.phases(micro_batch, None if x is None else tape.enter(x), tape)
        return phases if self.watch is None else _watched("F", phases, self.watch)

    def _backward(self, action: Action, deferred: deque[Callable[[], None]] | None) -> Generator[str, None, _Ended]:
        gradient = self._made.pop(("gradient", action.stage + 1, action.microbatch), None)
        last = action.stage == self.program.num_stages - 1
        assert (gradient is None) == last, f"{action} has no gradient"
        live = self._live[action.stage, action.microbatch]
        assert live.tape is not None, f"{action} has run before"
        tape, live.tape = live.tape, None
        queue, until_w = self.executor.chunks[action.stage].weight_queue, action.kind == "I"
        phases = tape.backward(gradient, queue, deferred, until_w)
        return phases if self.watch is None else _watched("B", phases, self.watch)

    def _end_forward(self, action: Action, made: tuple[Tensor | None, Any]) -> None:
        output, result = made
        self.results.append(result)
        if output is not None:
            self._made["activation", action.stage, action.microbatch] = output

    def _end_backward(self, action: Action, gradient: Tensor | None) -> None:
        if action.kind == "B":
            del self._live[action.stage, action.microbatch]
        if action.stage:
            if gradient is None:  # no loss of this stage or a later one counts
                shape, dtype, device = self.executor.buffer
                gradient = torch.zeros(shape, dtype=dtype, device=device)
            self._made["gradient", action.stage, action.microbatch] = gradient


def microbatches_of(schedule: Schedule, rank: int) -> dict[int, int]:
    """Number of micro-batches that each stage of a rank serves in a step."""
    served = dict.fromkeys(schedule.stages_of_rank[rank], 0)
    for action in schedule.actions[rank]:
        for part in parts(action):
            served[part.stage] += part.kind == "F"
    return served


def _describe_receive(transfer: Transfer) -> str:
    return f"waited for the {transfer.tensor} from pipeline rank {transfer.source}"


def _describe_send(transfer: Transfer) -> str:
    return f"waited for pipeline rank {transfer.target} to take the {transfer.tensor}"


def _watched(side: str, phases: Generator[str, None, Result], watch: Watch) -> Generator[str, None, Result]:
    """The phases of one side, with a call of `watch` when each begins and ends."""
    name = "begin"  # before the first phase
    while True:
        watch.phase(side, name)
        try:
            name = next(phases)
        except StopIteration as end:
            return cast(Result, end.value)
        finally:
            watch.phase(side, None)
        yield name
