"""Dispatch mode that sees every operation of a dry run, and answers what a GPU or other ranks would answer."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import Memory
from .metering import Communicator
from .operations import bytes_moved, flops, launches, name_of, tensors_in
from .rules import Event, HostWait, Launch, Wait

WAITS = frozenset(
    ["nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "equal"]
)
"""Operations whose result or its shape depends on values, so that the host waits for them on a GPU."""

DEVICE = "meta"

_PACKAGE = str(Path(__file__).parent.parent) + "/"


class Sent(NamedTuple):
    """Collective or message that this rank launched."""

    operation: str
    communicator: str
    """Name of the group, unique on this rank; see `Recorder.communicators`."""
    bytes: int
    """Bytes that this rank hands in, in all."""
    purpose: str
    """Purposes that the product's meter counted for it; "" where it counted none."""
    label: str
    """Label at the time."""


@dataclass
class Work:
    """Everything that ran under one label."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Kernels by operation."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes in and out of kernels by operation."""
    flops: float = 0.0
    waits: Counter[str] = field(default_factory=Counter)
    """Times that the host waits for the device, by operation and place in the source."""


class Recorder(TorchDispatchMode):
    """Books of a dry run: memory, kernels, host waits and collectives, each by the label at the time.

    Everything that the host reads from the device is 1, or True, but for what is `known`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(DEVICE)
        self.label = "begin"
        self.work: dict[str, Work] = defaultdict(Work)
        self.operations = 0
        self.used: set[str] = set()
        """Names of all operations with a kernel, with overloads."""
        self.mixed: Counter[str] = Counter()
        """Operations between tensors of the device and of the host, which a GPU refuses, by their place."""
        self.sent: list[Sent] = []
        self.communicators: dict[str, Communicator] = {}
        """Communicators that were used, by name."""
        self.known: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        """Values that the host reads in tensors of these shapes and types, in place of 1."""
        self.purposes: list[str] = []
        """Purposes that the meter has counted since the last collective."""
        self.program: list[Event] = []
        """Everything that ranks could wait for each other in, from the beginning on, see `rules.py`."""
        self.works: list[RecordedWork] = []

    def restart(self) -> None:
        """Forget what ran so far; what is alive stays."""
        self.work.clear()
        self.sent.clear()
        self.purposes.clear()
        self.operations = 0
        self.memory.restart()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        self.operations += 1
        name = name_of(func)
        given = list(tensors_in(args))
        here = any(tensor.device.type == DEVICE for tensor in given)
        if here:
            self._check_devices(name, given)
            answer = self._from_device(func, name, args, kwargs)
            if answer is not None:
                return answer
        slow = name == "_grouped_mm" and here and args[0].dtype != torch.bfloat16
        result = _grouped_shape(args) if slow else func(*args, **kwargs)
        made = list(tensors_in(result))
        on_device = [tensor for tensor in made if tensor.device.type == DEVICE]
        for tensor in on_device:
            self.memory.add(tensor, self.label)
        if not (on_device or here):
            return result
        work = self.work[self.label]
        if slow or self._to_device(name, given, on_device, kwargs):
            self._wait(work, name)
        if launches(func, given, made):
            work.kernels[name] += 1
            work.bytes[name] += bytes_moved(func, args, kwargs, made)
            work.flops += flops(func, args, made)
            self.used.add(str(func))
        return result

    def _check_devices(self, name: str, given: list[Tensor]) -> None:
        """Note an operation between the device and the host; numbers of no dimension may lie anywhere."""
        if name not in ("copy_", "_to_copy") and any(t.device.type != DEVICE and t.dim() for t in given):
            self.mixed[f"{name} at {_caller()}"] += 1

    def _from_device(self, func: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Values for the host in place of the device's; None where the operation reads none."""
        first = args[0]
        if name == "_local_scalar_dense":
            answer: Any = torch.ones((), dtype=first.dtype).item()
        elif name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            values = self.known.get((first.shape, first.dtype))
            answer = torch.ones(first.shape) if values is None else values.clone()
            answer = answer.to(kwargs.get("dtype") or first.dtype)
        elif name == "copy_" and first.device.type == "cpu":
            answer = first.fill_(1)
        elif name in WAITS:
            raise AssertionError(
                f"{func} at {_caller()}: the shape of its result waits for a GPU, and is not known here"
            )
        else:
            return None
        work = self.work[self.label]
        self._wait(work, name)
        work.kernels[name] += 1
        work.bytes[name] += first.nbytes
        return answer

    def _wait(self, work: Work, name: str) -> None:
        """Write a wait of the host down."""
        place = f"{name} at {_caller()}"
        work.waits[place] += 1
        self.program.append(HostWait(label=place))

    @staticmethod
    def _to_device(name: str, given: list[Tensor], on_device: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether the host waits until its own memory has been copied to the device."""
        if name == "lift_fresh":  # the end of torch.tensor(…, device=…)
            return bool(on_device)
        if name == "_to_copy":
            return bool(on_device) and given[0].device.type == "cpu" and not kwargs.get("non_blocking")
        return name == "copy_" and bool(on_device) and given[1].device.type == "cpu" and given[1].dim() > 0

    def _collective(self, func: OpOverload, args: tuple[Any, ...]) -> Any:
        """Write a collective down, and return what it would, without sending anything."""
        name = func._schema.name.partition("::")[2].strip("_")
        group = next(
            dist.ProcessGroup.unbox(value)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.name == "process_group"
        )
        if name not in ("recv", "barrier"):
            handed_in = args[1] if isinstance(args[1], Tensor | list) and name != "allreduce" else args[0]
            size = sum(tensor.nbytes for tensor in tensors_in(handed_in))
        else:
            size = 0
        communicator = group.group_name
        if communicator not in self.communicators:
            self.communicators[communicator] = Communicator.of(group)
        purpose = "" if name == "recv" else ", ".join(dict.fromkeys(self.purposes))
        if name != "recv":
            self.purposes.clear()
        self.sent.append(Sent(name, communicator, size, purpose, self.label))
        peer = dist.get_process_group_ranks(group)[args[2]] if name in ("send", "recv") else None
        made = RecordedWork(self, len(self.works))
        self.works.append(made)  # torch finds the methods of Python's object only while it lives
        self.program.append(Launch(group.group_desc, name, peer, label=self.label))
        work = made.boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


class RecordedWork(dist.Work):
    """Handle of a collective that nothing runs: whoever waits for it is written down."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        super().__init__()
        self._recorder, self._number = recorder, number

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._recorder.program.append(Wait(self._number))
        return True


def _grouped_shape(args: tuple[Any, ...]) -> Tensor:
    """Result of a grouped product that is not in BF16: GPUs run a loop, for which the host reads the offsets, and the
    meta device refuses it."""
    left, right, offsets = args[:3]
    if right.dim() == 2:
        return torch.empty(len(offsets), left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    return torch.empty(left.shape[0], right.shape[-1], dtype=left.dtype, device=left.device)


def _caller() -> str:
    """Innermost line of the package's own code that is not the dry run's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and "/dryrun/" not in file:
            return f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
