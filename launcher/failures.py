"""Failures of ranks: the user is shown the first cause, once, and none of its consequences on other ranks.

A rank that fails writes a record for its launcher and ends at once, because its peers wait for it. A peer that only
lost its connection waits a moment first. Its launcher ends it meanwhile, so the cause is the only failure on record.
The record has torchrun's format, so that torchrun's summary shows the same cause.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..settings import UsageError
from .environment import WorkerEnvironment

FAILED = 1
BAD_USAGE = 2

# Launchers look at their processes every 0.1 s. A process that still runs after this time was not ended by a launcher.
GRACE_SECONDS = 3.0

# Messages of gloo, NCCL and the store after the loss of a peer. A wrong guess costs GRACE_SECONDS, never the report.
_LOST_PEER = re.compile(
    r"gloo/transport|NCCL|TCPStore|[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Ss]ocket [Tt]imeout"
)


@dataclass(frozen=True)
class FailureRecord:
    """Reason of one rank's failure. `text` is a traceback, or the plain message of a UsageError."""

    text: str
    usage: bool
    lost_peer: bool
    time: float

    @staticmethod
    def of(error: BaseException) -> FailureRecord:
        usage = isinstance(error, UsageError)
        text = str(error) if usage else "".join(traceback.format_exception(error)).rstrip("\n")
        return FailureRecord(text, usage, is_lost_peer(error), time.time())

    def write(self, path: Path) -> None:
        """Write the whole record or none: the launcher may end this process at any moment."""
        extra = {"py_callstack": self.text, "timestamp": str(int(self.time))}
        content = {"message": {"message": self.text.splitlines()[-1], "extraInfo": extra}, "counterflow": vars(self)}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> FailureRecord | None:
        """Record at `path`; None where the process ended without writing one."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return FailureRecord(**content["counterflow"])


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether another rank failed first: `error` says so, or a collective lost a peer in `error` or its cause."""
    if getattr(error, "elsewhere", False):
        return True
    while error is not None:
        if any(base.__name__ == "DistError" for base in type(error).__mro__):
            return True
        if isinstance(error, RuntimeError | ConnectionError) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def supervised(worker: WorkerEnvironment) -> Iterator[None]:
    """Run the work of a launched process: record its failure for the launcher, and leave no orphan.

    A failure ends the process here, with 2 for a UsageError and 1 for anything else. For launchers that read no record,
    such as srun, it is printed. In a process without a launcher, exceptions pass to the caller.
    """
    if worker.launcher == "none":
        yield
        return
    if worker.parent is not None:
        _die_with(worker.parent)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        _record_and_exit(error, worker.rank, worker.error_file)


def _record_and_exit(error: BaseException, rank: int, error_file: Path | None) -> NoReturn:
    """End this process, whose communicators are alive: leaving Python would wait in them for the peers."""
    if isinstance(error, KeyboardInterrupt):
        _exit(128 + signal.SIGINT)
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # without the frame of `supervised`
    record = FailureRecord.of(error)
    if record.lost_peer:
        time.sleep(GRACE_SECONDS)
    if error_file is not None:
        record.write(error_file)
    else:
        print(f"rank {rank} failed:\n{record.text}", file=sys.stderr)
    _exit(BAD_USAGE if record.usage else FAILED)


def _exit(code: int) -> NoReturn:
    """End without clean-up: clean-up could wait for threads and peers that wait for this process."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """End this process and its children soon after `parent` has ended, so that even kill -9 leaves no orphans."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
