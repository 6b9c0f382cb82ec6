"""Model of how NCCL's kernels start, run and wait for each other on all GPUs of a run, without times.

A program is what one rank's host does: it launches kernels of communicators, lets a stream wait for one, or waits
itself. `machine.rehearse` runs the programs of all ranks by these rules:

- A communicator is a queue: a kernel starts when the one before it on this rank has ended.
- A kernel starts after everything that its stream had to wait for when the host launched it.
- A kernel ends when every member of the communicator has started its own. A send ends only once it is received.
- A kernel takes multiprocessors from its start to its end, and starts only with all of them.
- Streams share the hardware's queues (`CUDA_DEVICE_MAX_CONNECTIONS`), in which what is first holds up all behind it.
- With `NCCL_LAUNCH_ORDER_IMPLICIT` a rank's kernels start in the order of the host's calls: on drivers for CUDA 12.3
  and newer each after the start of the one before, on older ones after its end.

Kernels that compute always end, so they are not part of the model. What remains is a circle of kernels that wait for
each other, and `rehearse` returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

COMPUTE = "compute"
"""Name of the stream that computes."""


class Launch(NamedTuple):
    """Kernel of a communicator, put behind those that the rank has launched on it before."""

    communicator: str
    operation: str
    peer: int | None = None
    """The other rank of a `send` or a `recv`."""
    stream: str = COMPUTE
    label: str = ""
    """Place in the program, for messages."""


class Wait(NamedTuple):
    """Wait of a stream for one of the rank's launches, by its number."""

    launch: int
    stream: str = COMPUTE


class Join(NamedTuple):
    """Wait of a stream for everything that another stream has waited for so far."""

    stream: str
    other: str


class HostWait(NamedTuple):
    """Wait of the host for everything that a stream has waited for so far."""

    stream: str = COMPUTE
    label: str = ""


Event = Launch | Wait | Join | HostWait
Program = Sequence[Event]


@dataclass(frozen=True)
class Rules:
    """Settings of the model."""

    multiprocessors: int = 132
    """Multiprocessors of a GPU that NCCL's kernels may take in all."""
    order: Literal["none", "start", "end"] = "none"
    """Order of kernels of different communicators: none, or each after the start or the end of the one before."""
    connections: int | None = None
    """Queues of the hardware, which streams take in turn when they are first used; None for as many as needed."""
    seed: int = 0
    """Choice of the kernels that get multiprocessors first where the order is none, by a random generator."""


class Group(NamedTuple):
    """Communicator of one rank: who takes part, and the most multiprocessors that its kernels take."""

    ranks: tuple[int, ...]
    ctas: int


class Blocked(NamedTuple):
    """A kernel, or a host, that waits for ever."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class MismatchError(Exception):
    """Kernels of one communicator that do not belong together: the ranks launch different things."""


def always_room(groups: Mapping[str, Group], rules: Rules) -> bool:
    """Whether a rank has room for a kernel of every communicator at once.

    Then no choice of the hardware decides what starts, and one rehearsal proves that there is no circle.
    """
    return sum(group.ctas for group in groups.values()) <= rules.multiprocessors
