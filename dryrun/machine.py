"""All GPUs of a run under NCCL's rules (`rules.py`): what has started and ended, and who waits for whom."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from .rules import COMPUTE, Blocked, Group, HostWait, Join, Launch, MismatchError, Program, Rules, Wait


def rehearse(
    programs: Mapping[int, Program], groups: Mapping[int, Mapping[str, Group]], rules: Rules | None = None
) -> list[Blocked]:
    """Run all programs to their end, or return the circle of those that wait for each other.

    Args:
        programs: by rank.
        groups: by rank and by the name that its program has for the communicator.

    Raises:
        MismatchError: ranks launch different operations on a communicator, or a different number of them.
    """
    return _Machine(programs, groups, rules or Rules()).run()


_Kind = tuple[str, tuple[int, ...], tuple[int, int] | None]


@dataclass(eq=False)
class _Kernel:
    """One launch on one rank."""

    rank: int
    launch: Launch
    group: Group
    index: int
    """Number among the rank's launches of its kind: collectives of a communicator, or sends between two ranks."""
    after: int
    """Waits of its stream that have to be over before it starts."""
    granted: int = 0
    started: bool = False
    ended: bool = False

    @property
    def kind(self) -> _Kind:
        """Kernels among which this one is counted, on all ranks alike."""
        operation, peer = self.launch.operation, self.launch.peer
        if peer is None:
            return self.launch.communicator, self.group.ranks, None
        way = (self.rank, peer) if operation == "send" else (peer, self.rank)
        return self.launch.communicator, self.group.ranks, way

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks that take part."""
        return self.kind[2] or self.group.ranks

    def __str__(self) -> str:
        where = f" in {self.launch.label}" if self.launch.label else ""
        way = {"send": f" to {self.launch.peer}", "recv": f" from {self.launch.peer}"}.get(self.launch.operation, "")
        return f"{self.launch.operation} {self.index}{way} of {self.launch.communicator} {self.group.ranks}{where}"


class _Stream:
    """Waits of a stream, in order."""

    def __init__(self) -> None:
        self.items: list[_Kernel | tuple[_Stream, int]] = []
        self.done = 0

    def advance(self) -> bool:
        before = self.done
        while self.done < len(self.items) and self._is_over(self.items[self.done]):
            self.done += 1
        return self.done > before

    def next(self) -> _Kernel:
        """The kernel that this stream waits for."""
        item = self.items[self.done]
        return item if isinstance(item, _Kernel) else item[0].next()

    @staticmethod
    def _is_over(item: _Kernel | tuple[_Stream, int]) -> bool:
        return item.ended if isinstance(item, _Kernel) else item[0].done >= item[1]


class _Hardware:
    """Queues in which the streams of a GPU share what they launch."""

    def __init__(self, connections: int | None) -> None:
        self.connections = connections
        self.of_stream: dict[str, deque[_Kernel | tuple[_Stream, int]]] = {}
        self.queues: list[deque[_Kernel | tuple[_Stream, int]]] = []

    def add(self, stream: str, item: _Kernel | tuple[_Stream, int]) -> None:
        """Put a kernel, or a wait of a stream up to a number of its items, into the queue of its stream."""
        if self.connections is None:
            return
        if stream not in self.of_stream:
            if len(self.queues) < self.connections:
                self.queues.append(deque())
            self.of_stream[stream] = self.queues[len(self.of_stream) % self.connections]
        self.of_stream[stream].append(item)

    def before(self, stream: str, kernel: _Kernel) -> _Kernel | tuple[_Stream, int] | None:
        """Return what holds a kernel up in its queue; None if it is first."""
        queue = self.of_stream[stream]
        while queue[0] is not kernel and self._has_passed(queue[0]):
            queue.popleft()
        return None if queue[0] is kernel else queue[0]

    @staticmethod
    def _has_passed(item: _Kernel | tuple[_Stream, int]) -> bool:
        return item.started if isinstance(item, _Kernel) else item[0].done >= item[1]


class _Rank:
    """Host, streams and communicators of one rank."""

    def __init__(self, rank: int, program: Program, groups: Mapping[str, Group], connections: int | None) -> None:
        self.rank, self.program, self.groups = rank, program, groups
        self.hardware = _Hardware(connections)
        self.position = 0
        self.launched: list[_Kernel] = []
        self.waiting: list[_Kernel] = []
        """Launched kernels that have not started, in the host's order."""
        self.streams: dict[str, _Stream] = {COMPUTE: _Stream()}
        self.queues: dict[str, deque[_Kernel]] = {}
        self.counts: Counter[_Kind] = Counter()
        self.running: list[_Kernel] = []
        self.taken = 0

    @property
    def finished(self) -> bool:
        """Whether the host has done everything."""
        return self.position == len(self.program)

    def stream(self, name: str) -> _Stream:
        return self.streams.setdefault(name, _Stream())

    def host(self) -> bool:
        """Let the host go on as far as it can."""
        before = self.position
        while self.position < len(self.program):
            event = self.program[self.position]
            if isinstance(event, Launch):
                self._launch(event)
            elif isinstance(event, Wait):
                self._hold(event.stream, self.launched[event.launch])
            elif isinstance(event, Join):
                other = self.stream(event.other)
                self._hold(event.stream, (other, len(other.items)))
            else:
                stream = self.stream(event.stream)
                stream.advance()
                if stream.done < len(stream.items):
                    break
            self.position += 1
        return self.position > before

    def _hold(self, name: str, item: _Kernel | tuple[_Stream, int]) -> None:
        """Let a stream wait for a kernel, or for another stream."""
        stream = self.stream(name)
        stream.items.append(item)
        self.hardware.add(name, (stream, len(stream.items)))

    def _launch(self, event: Launch) -> None:
        after = len(self.stream(event.stream).items)
        kernel = _Kernel(self.rank, event, self.groups[event.communicator], 0, after)
        kernel.index = self.counts[kernel.kind]
        self.counts[kernel.kind] += 1
        self.launched.append(kernel)
        self.waiting.append(kernel)
        self.queues.setdefault(event.communicator, deque()).append(kernel)
        self.hardware.add(f"of {event.communicator}", kernel)

    def is_ready(self, kernel: _Kernel) -> bool:
        """Whether its queues and its stream let a kernel start."""
        if self.queues[kernel.launch.communicator][0] is not kernel:
            return False
        if self.stream(kernel.launch.stream).done < kernel.after:
            return False
        return self.hardware.connections is None or self.before(kernel) is None

    def before(self, kernel: _Kernel) -> _Kernel | tuple[_Stream, int] | None:
        """Return what holds a kernel up in its queue of the hardware."""
        return self.hardware.before(f"of {kernel.launch.communicator}", kernel)


class _Machine:
    """All ranks of a run."""

    def __init__(
        self, programs: Mapping[int, Program], groups: Mapping[int, Mapping[str, Group]], rules: Rules
    ) -> None:
        self.rules = rules
        self.ranks = {rank: _Rank(rank, program, groups[rank], rules.connections) for rank, program in programs.items()}
        self.met: dict[tuple[_Kind, int], list[_Kernel]] = {}
        self.random = random.Random(rules.seed)

    def run(self) -> list[Blocked]:
        pending = list(self.ranks)
        while pending:
            at = self.random.randrange(len(pending)) if self.rules.order == "none" else -1
            rank = pending.pop(at)
            pending += self._advance(self.ranks[rank]).difference(pending)
        stuck = [rank for rank in self.ranks.values() if rank.waiting or rank.running or not rank.finished]
        return self._circle(stuck[0]) if stuck else []

    def _advance(self, rank: _Rank) -> set[int]:
        """Let a rank go on as far as it can; returns the ranks whose kernels have ended by that."""
        touched: set[int] = set()
        progress = True
        while progress:
            progress = rank.host()
            for stream in list(rank.streams.values()):
                progress |= stream.advance()
            for kernel in self._candidates(rank):
                if self._start(rank, kernel):
                    touched |= self._meet(kernel)
                    progress = True
                    break
        return touched - {rank.rank}

    def _candidates(self, rank: _Rank) -> list[_Kernel]:
        """Kernels that may start now, as far as order, queues and streams decide."""
        if self.rules.order != "none":
            first = rank.waiting[:1]
            if self.rules.order == "end" and rank.running:
                return []
            return [kernel for kernel in first if rank.is_ready(kernel)]
        ready = [kernel for kernel in rank.waiting if rank.is_ready(kernel)]
        self.random.shuffle(ready)
        return ready

    def _start(self, rank: _Rank, kernel: _Kernel) -> bool:
        """Give a kernel multiprocessors that are free, and start it once it has all of them."""
        grant = min(self.rules.multiprocessors - rank.taken, kernel.group.ctas - kernel.granted)
        kernel.granted += grant
        rank.taken += grant
        if kernel.granted < kernel.group.ctas:
            return False
        kernel.started = True
        rank.waiting.remove(kernel)
        rank.running.append(kernel)
        return True

    def _meet(self, kernel: _Kernel) -> set[int]:
        """Count a member's start; with the last one the kernel ends on all members, whose ranks are returned."""
        peers = self.met.setdefault((kernel.kind, kernel.index), [])
        peers.append(kernel)
        if len(peers) < len(kernel.members):
            return set()
        del self.met[kernel.kind, kernel.index]
        operations = {peer.launch.operation for peer in peers}
        if operations not in ({"send", "recv"}, {kernel.launch.operation}):
            peers.sort(key=lambda peer: peer.rank)
            raise MismatchError("; ".join(f"rank {peer.rank} launches {peer}" for peer in peers))
        for peer in peers:
            rank = self.ranks[peer.rank]
            peer.ended = True
            rank.queues[peer.launch.communicator].popleft()
            rank.running.remove(peer)
            rank.taken -= peer.granted
        return {peer.rank for peer in peers}

    def _circle(self, first: _Rank) -> list[Blocked]:
        """The circle that is reached from a stuck rank by going on to the kernel or host that each one waits for."""
        node: _Kernel | _Rank | None = first if not first.finished else (first.running + first.waiting)[0]
        seen: list[_Kernel | _Rank] = []
        texts: list[Blocked] = []
        while node is not None and not any(node is each for each in seen):
            seen.append(node)
            rank = node.rank
            text, node = self._cause_of_host(node) if isinstance(node, _Rank) else self._cause(node)
            texts.append(Blocked(rank, text))
        start = next((index for index, each in enumerate(seen) if each is node), 0)
        return texts[start:]

    @staticmethod
    def _cause_of_host(rank: _Rank) -> tuple[str, _Kernel]:
        event = rank.program[rank.position]
        assert isinstance(event, HostWait), event
        waited_for = rank.stream(event.stream).next()
        return f"the host waits{f' in {event.label}' if event.label else ''} for {waited_for}", waited_for

    def _cause(self, kernel: _Kernel) -> tuple[str, _Kernel | _Rank]:
        rank = self.ranks[kernel.rank]
        if kernel.started:
            return self._absent(kernel)
        head = rank.queues[kernel.launch.communicator][0]
        if head is not kernel:
            return f"{kernel} is behind {head} in one queue", head
        stream = rank.stream(kernel.launch.stream)
        if stream.done < kernel.after:
            waited_for = stream.next()
            return f"{kernel} starts when its stream is past {waited_for}", waited_for
        before = rank.before(kernel) if self.rules.connections is not None else None
        if before is not None:
            first = before if isinstance(before, _Kernel) else before[0].next()
            return f"{kernel} shares a queue of the hardware with one that waits for {first}", first
        if self.rules.order != "none" and rank.waiting[0] is not kernel:
            return f"{kernel} starts after {rank.waiting[0]}, which was launched before", rank.waiting[0]
        if self.rules.order == "end" and rank.running:
            return f"{kernel} starts when {rank.running[0]} has ended, which was launched before", rank.running[0]
        holders = [*rank.running, *(other for other in rank.waiting if other.granted and other is not kernel)]
        held = ", ".join(f"{other.granted} by {other}" for other in holders)
        return f"{kernel} needs {kernel.group.ctas} of {self.rules.multiprocessors} multiprocessors: {held}", holders[0]

    def _absent(self, kernel: _Kernel) -> tuple[str, _Kernel | _Rank]:
        """The first member that has not started this kernel."""
        there = {peer.rank for peer in self.met[kernel.kind, kernel.index]}
        absent = next(self.ranks[rank] for rank in kernel.members if rank not in there)
        text = f"{kernel} runs until rank {absent.rank} starts it"
        if kernel.index < absent.counts[kernel.kind]:
            return text, next(k for k in absent.waiting if (k.kind, k.index) == (kernel.kind, kernel.index))
        if absent.finished:
            raise MismatchError(f"rank {absent.rank} ends without launching {kernel}, which rank {kernel.rank} runs")
        return text, absent
