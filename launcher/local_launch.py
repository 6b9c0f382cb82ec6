"""Local launch, `--nproc N`: ranks of a run as processes of this machine, through torch's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..settings import UsageError
from .environment import PARENT_VARIABLE, threads_per_process
from .failures import FAILED, FailureRecord
from .logs import log_path

LAST_LINES = 20  # lines shown of a rank that left no traceback
_WITH_STACKS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_REASONS = {
    int(signal.SIGKILL): "the system does this when memory runs out",
    int(signal.SIGABRT): "C++ code gave up, as NCCL's watchdog does after parallel.timeout",
}
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ELASTIC_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher")


def launch_local(nproc: int, command: Sequence[str], logs_folder: Path | None = None) -> int:
    """Run `command`, the interpreter's arguments (`-m counterflow train …`), as `nproc` ranks and wait for them.

    Returns the exit code: 0, or 1 after printing the failure that came first, or 128 + the signal that ended this
    process. Raises a worker's UsageError. Rank 0 writes to this process's console. The others have temporary files
    until they open their logs; `logs_folder` serves only to name the logs. The failure of one rank ends all, and none
    outlives this process.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="counterflow-")))
        stack.enter_context(_variables_for_workers(nproc))
        interrupted = stack.enter_context(_interrupt_ends_workers())
        stack.enter_context(_quiet_elastic())
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # any free port
            local_addr="127.0.0.1",
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in _ENDING_SIGNALS if not _is_ignored(number)),
            logs_specs=DefaultLogsSpecs(str(scratch), redirects=dict.fromkeys(range(1, nproc), Std.ALL)),
        )
        # -P: the clone's folders must not shadow other packages. The agent expands $ as a macro.
        arguments = ["-P", *(argument.replace("$", "$$") for argument in command)]
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            return _report(error.failures, scratch, logs_folder)
        except SignalException as error:
            _restore_terminal()
            return 128 + (signal.SIGINT if interrupted else error.sigval)
    return 0


@contextmanager
def _variables_for_workers(nproc: int) -> Iterator[None]:
    """Set the variables that workers inherit in addition to their ranks.

    The variables are set in this process's environment, because the agent offers no other way.
    """
    added = {
        "OMP_NUM_THREADS": str(threads_per_process(os.environ, nproc)),
        PARENT_VARIABLE: str(os.getpid()),
        **_loopback(os.environ),
    }
    replaced = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in replaced.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable that keeps gloo on the loopback device: its look-up of the host name fails on many laptops."""
    if "GLOO_SOCKET_IFNAME" in environ:
        return {}
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


@contextmanager
def _interrupt_ends_workers() -> Iterator[list[int]]:
    """Turn Ctrl-C into SIGTERM for the workers; the list yielded is not empty afterwards.

    SIGINT does not end a worker inside a collective: Python handles it only between instructions. The agent sets
    handlers for other signals and does not restore them, so all are restored here.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING_SIGNALS)}
    interrupted: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        raise SignalException("interrupted", signal.SIGTERM)

    if not _is_ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, end)
    try:
        yield interrupted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started with the signal ignored, as nohup does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


class _RecordHolder(logging.Handler):
    """Handler that keeps log records and shows none."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Hold back the agent's log about failing workers, and show it if the agent itself fails."""
    holder = _RecordHolder()
    loggers = [logging.getLogger(name) for name in _ELASTIC_LOGGERS]
    for logger in loggers:
        logger.addHandler(holder)
        logger.propagate = False
    try:
        yield
    except (SignalException, UsageError):
        raise
    except Exception:
        for record in holder.records:
            logging.getLogger().handle(record)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(holder)
            logger.propagate = True


def _report(failures: Mapping[int, ProcessFailure], scratch: Path, logs_folder: Path | None) -> int:
    """Print which rank failed first and why, and return the exit code. Raises the rank's UsageError instead."""
    folders = {rank: _folder(scratch, failure.local_rank) for rank, failure in failures.items()}
    records = {rank: FailureRecord.read(folder / "error.json") for rank, folder in folders.items()}

    def order(rank: int) -> tuple[bool, float]:
        record, failure = records[rank], failures[rank]
        if record is None:
            # The agent either ended this rank, or noticed its end up to 0.1 s later and noted it in whole seconds.
            return failure.exitcode == -signal.SIGTERM, failure.timestamp - 0.1
        return record.lost_peer, record.time

    first = min(failures, key=order)
    record = records[first]
    _restore_terminal()
    if record is not None and record.usage:
        raise UsageError(record.text)
    log = log_path(logs_folder, first) if logs_folder else None
    log = log if log is not None and log.exists() else None
    if record is not None:
        print(f"rank {first} failed:\n{record.text}", file=sys.stderr)
    else:
        print(f"rank {first} {_ending(failures[first])}", file=sys.stderr)
        code = failures[first].exitcode
        lines = (_last_lines(log, code) if log else []) or _last_lines(folders[first] / "stderr.log", code)
        if lines:
            print("its last lines:", *lines, sep="\n  ", file=sys.stderr)
    if log:
        print(f"full log of rank {first}: {log}", file=sys.stderr)
    return FAILED


def _folder(scratch: Path, local_rank: int) -> Path:
    (folder,) = scratch.glob(f"*/attempt_0/{local_rank}")
    return folder


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with exit code {failure.exitcode} and left no traceback"
    hint = _REASONS.get(-failure.exitcode)
    return f"was killed by {failure.signal_name()}{f' ({hint})' if hint else ''}"


def _last_lines(path: Path, exitcode: int) -> list[str]:
    """The last lines of a rank's output; after a fatal signal without the stacks that Python adds behind its name."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if -exitcode in _WITH_STACKS:
        fatal = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
        lines = lines[: fatal[-1] + 1] if fatal else lines
    return lines[-LAST_LINES:]


def _restore_terminal() -> None:
    """End the line of a progress bar that was cut off, and show the cursor that the bar hid."""
    if sys.stderr.isatty():
        print("\x1b[?25h", file=sys.stderr)
