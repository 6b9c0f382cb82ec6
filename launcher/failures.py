"""How a rank's failure reaches the user: the first cause, once, and nothing of what it causes elsewhere.

A failing rank leaves a record for its launcher and goes at once, for its peers wait for it. A peer that only lost its
connection waits a moment first: its launcher will end it, so the cause is the only failure that is on record. The
record has the form torchrun reads, so torchrun's summary shows the same cause.
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

# Launchers look at their processes every 0.1 s; what is recorded later than this was not ended by one.
GRACE_SECONDS = 3.0

# What gloo, NCCL and the store say when the other end is gone. A wrong guess costs the grace, never the report.
_LOST_PEER = re.compile(
    r"gloo/transport|NCCL|TCPStore|[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|[Ss]ocket [Tt]imeout"
)


@dataclass(frozen=True)
class FailureRecord:
    """Why a rank failed, as it saw it. `text` is a traceback, or the plain message of a UsageError."""

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
        """Write the record whole or not at all: the launcher may end this process at any moment."""
        extra = {"py_callstack": self.text, "timestamp": str(int(self.time))}
        content = {"message": {"message": self.text.splitlines()[-1], "extraInfo": extra}, "counterflow": vars(self)}
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.replace(path)

    @staticmethod
    def read(path: Path) -> FailureRecord | None:
        """The record at `path`; None where the process was gone before it could write one."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return FailureRecord(**content["counterflow"])


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is a collective that lost its other end, or says another rank is to blame."""
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
    """Run a worker's work under its launcher's eye: leave a record of a failure, and no orphan.

    A failure ends the process from here, with 2 for a UsageError and 1 for anything else. A process that nobody
    launched is left alone: its exceptions are the caller's.
    """
    if worker.launcher == "none":
        yield
        return
    if worker.parent is not None:
        _die_with(worker.parent)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if worker.error_file is None:
            raise
        _leave(error, worker.error_file)


def _leave(error: BaseException, error_file: Path) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        _exit(128 + signal.SIGINT)
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # the frame of `supervised` says nothing
    record = FailureRecord.of(error)
    if record.lost_peer:
        time.sleep(GRACE_SECONDS)
    record.write(error_file)
    _exit(BAD_USAGE if record.usage else FAILED)


def _exit(code: int) -> NoReturn:
    """End without clean-up, which could wait for threads and peers that wait for this process."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """End this process, and what it started, soon after `parent` is gone: even kill -9 leaves no orphans."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
