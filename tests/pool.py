"""Pool of gloo processes that all tests of several ranks share.

    def test_ranks_agree(pool):
        assert pool.run(_sum_of_ranks, 4) == [6, 6, 6, 6]

    def _sum_of_ranks(worker):                      # a lambda, a closure or a method works too
        total = torch.tensor(worker.rank)
        torch.distributed.all_reduce(total)
        return int(total)

`pool.run(function, world_size, *args)` calls `function(worker, *args)` in `world_size` processes. It returns the
ranks' results in rank order. During a run torch's default process group is new and holds exactly these ranks.
Afterwards every group is destroyed, so no run sees another's groups. Functions, arguments and results travel by
cloudpickle: definitions of test files by value, definitions of `counterflow` by name.

An exception in a rank fails the test with that rank's traceback. A rank that is still running after `timeout` seconds
fails the test with the stacks of all ranks, and the pool starts new processes for the next test.

Importing torch takes a process seconds, so one process (the nursery) imports everything and forks the others.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

POOL_SIZE = 8
START_TIMEOUT = 120.0  # seconds; a start takes 3 on two idle cores, forking again half of one
TIMEOUT = 300.0  # seconds; a run takes 10 at most, and a busy machine makes it ten times as long
GRACE = 20.0  # seconds for the others after the first rank has failed
TESTS = os.path.dirname(os.path.realpath(__file__)) + os.sep

# Modules of the workers, imported once before the fork: torch.optim imports torch._dynamo, a second per process.
PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
    "pydantic",
    "pytest",  # rewritten asserts refer to it
    "yaml",
)

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # no C++ stack traces when workers are killed
    "GLOO_SOCKET_IFNAME": "lo",  # no name server has to resolve this machine's name
}


@dataclass
class Worker:
    """Rank of a process, and the ranks of its run."""

    rank: int
    world_size: int
    ranks: list[int] = field(default_factory=list)


class RankFailure(AssertionError):
    """Error of a rank that raised or hung; the message holds its traceback or all stacks."""


class Pool:
    """Eight gloo processes with one thread each, started at the first `run`."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # the socket and the workers' stacks
        self._listener: socket.socket | None = None
        self._nursery: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []  # by rank; empty: no workers are running
        self._pids: list[int] = []
        self._runs = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call `function(worker, *args)` on ranks 0 to world_size - 1.

        Args:
            function: called with a `Worker` first.
            world_size: number of ranks, 1 to 8.
            args: further arguments, the same for every rank; pickled.
            timeout: seconds until the run counts as hung.

        Returns:
            The ranks' return values in rank order.

        Raises:
            RankFailure: a rank raised, died, or was still running after `timeout`.
        """
        if not 1 <= world_size <= POOL_SIZE:
            raise ValueError(f"the pool has {POOL_SIZE} processes, world_size {world_size} does not fit")
        if not self._connections:
            self._start()
        self._runs += 1
        header = cloudpickle.dumps((self._runs, world_size, timeout))
        payload = _dumps_by_value(function, args)
        for connection in self._connections[:world_size]:
            connection.send_bytes(header)
            connection.send_bytes(payload)
        return self._collect(world_size, timeout)

    def close(self) -> None:
        """End all processes; the next `run` starts new ones."""
        self._drop_workers()
        if self._nursery is not None:
            assert self._nursery.stdin is not None and self._listener is not None and self._folder is not None
            self._nursery.stdin.close()
            self._nursery.wait(timeout=30)
            self._listener.close()
            self._folder.cleanup()
            self._nursery = self._listener = self._folder = None

    def _drop_workers(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections, self._pids = [], []

    def _start(self) -> None:
        """Fork new workers and kill the old ones; start the nursery first if there is none."""
        if self._nursery is None:
            self._folder = tempfile.TemporaryDirectory(prefix="counterflow-pool-")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"{self._folder.name}/socket")
            self._listener.listen(POOL_SIZE)
            self._nursery = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    "from counterflow.tests.pool import nursery; nursery()",
                    self._folder.name,
                ],
                stdin=subprocess.PIPE,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C ends pytest, which then closes the pool
            )
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(b"fork\n")
        self._nursery.stdin.flush()
        connections = [self._accept() for _ in range(POOL_SIZE)]
        places = [cloudpickle.loads(connection.recv_bytes()) for connection in connections]
        self._connections = [connections[places.index((rank, pid))] for rank, pid in sorted(places)]
        self._pids = [pid for _, pid in sorted(places)]

    def _accept(self) -> Connection:
        assert self._listener is not None and self._nursery is not None
        deadline = time.monotonic() + START_TIMEOUT
        self._listener.settimeout(0.5)
        while time.monotonic() < deadline:
            if self._nursery.poll() is not None:
                raise RankFailure("the pool's processes could not start: see their messages above")
            with contextlib.suppress(TimeoutError):
                accepted, _ = self._listener.accept()
                accepted.setblocking(True)
                return Connection(accepted.detach())
        raise RankFailure(f"the pool's processes did not start within {START_TIMEOUT:.0f} s")

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, tuple[float, str]] = {}  # time and traceback
        dead: list[int] = []
        waiting = {self._connections[rank]: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, value = cloudpickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, (0.0, f"the process of rank {rank} died\n")
                    dead.append(rank)
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        hung = sorted(waiting.values())
        stacks = self._dump_stacks(world_size) if hung else ""
        if hung or dead:
            self._drop_workers()
        # Ranks close their connections only now: until here another rank could still be opening its end.
        for connection in self._connections[:world_size]:
            connection.send_bytes(b"leave")
        if hung or failures:
            raise RankFailure(_describe(world_size, failures, hung, timeout, stacks))
        return [results[rank] for rank in range(world_size)]

    def _dump_stacks(self, world_size: int) -> str:
        assert self._folder is not None
        for pid in self._pids[:world_size]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)  # the handlers write at once, but they need a processor
        parts = []
        for rank in range(world_size):
            stack = Path(self._folder.name, f"rank-{rank}").read_text()
            parts.append(f"--- stack of rank {rank}\n{stack}")
        return "".join(parts)


def _describe(
    world_size: int, failures: dict[int, tuple[float, str]], hung: list[int], timeout: float, stacks: str
) -> str:
    parts = []
    if failures:
        # The earliest failure is the cause; the others mostly lost their connection to that rank.
        cause, *echoes = sorted(failures, key=lambda rank: failures[rank][0])
        parts.append(f"rank {cause} of {world_size} failed:\n{failures[cause][1]}")
        parts += [f"rank {rank} failed after it: {failures[rank][1].strip().splitlines()[-1]}\n" for rank in echoes]
    if hung:
        since = f"{GRACE:g} s after the first rank had failed" if failures else f"after {timeout:g} s"
        parts.append(f"ranks {hung} were still running {since}\n{stacks}")
    return "".join(parts)


def _dumps_by_value(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle all definitions of test files by value: a worker cannot import them by name."""
    modules = [module for module in list(sys.modules.values()) if _is_test_file(module)]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps((function, args))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_test_file(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None) or ""
    inside = "tests" in file and os.path.realpath(file).startswith(TESTS)
    return inside and module.__name__ != __name__


# Below: functions that run in the other processes.


def nursery() -> None:
    """Import everything once, fork new workers for every line of stdin, and end them when stdin closes."""
    for name in PRELOAD:
        __import__(name)
    children: list[int] = []
    for _ in sys.stdin.buffer:  # ends when the other end closes, even if pytest died
        _kill(children)
        with socket.create_server(("127.0.0.1", 0)) as store_listener:
            children = [_fork_worker(rank, store_listener, Path(sys.argv[1])) for rank in range(POOL_SIZE)]
    _kill(children)
    os._exit(0)  # without a second of cleaning up


def _kill(children: list[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


def _fork_worker(rank: int, store_listener: socket.socket, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _serve(rank, store_listener, folder)
        except EOFError:
            pass  # the pool has closed
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def _serve(rank: int, store_listener: socket.socket, folder: Path) -> None:
    """Answer one run after another until the other end closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    port, handle = store_listener.getsockname()[1], store_listener.detach()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=handle)
    else:
        os.close(handle)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with open(folder / f"rank-{rank}", "w") as stack_file, socket.socket(socket.AF_UNIX) as client:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        client.connect(f"{folder}/socket")
        connection = Connection(client.detach())
        connection.send_bytes(cloudpickle.dumps((rank, os.getpid())))
        while True:
            run, world_size, timeout = cloudpickle.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
            run_store = dist.PrefixStore(f"run-{run}", store)  # group names repeat from run to run
            connection.send_bytes(_answer(rank, world_size, timeout, payload, run_store))
            connection.recv_bytes()  # all have answered
            _leave_world()


def _answer(rank: int, world_size: int, timeout: float, payload: bytes, store: Any) -> bytes:
    """Run one function in a new world; return `(succeeded, result or traceback)`, pickled."""
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=2 * timeout)
        )
        function, args = cloudpickle.loads(payload)
        result = function(Worker(rank, world_size, list(range(world_size))), *args)
        return cloudpickle.dumps((True, result))
    except BaseException:
        failure = time.monotonic(), traceback.format_exc()
    _leave_world()  # breaks the connections that others wait on: they fail at once instead of by timeout
    return cloudpickle.dumps((False, failure))


def _leave_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
