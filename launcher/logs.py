"""Logs of a run: a file for each rank, and also the console for rank 0."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

STDOUT, STDERR = 1, 2  # file descriptors, which C++ writes to as well


def log_path(folder: Path, rank: int) -> Path:
    """File of `rank` in a run's log folder."""
    return folder / f"rank-{rank}.log"


@contextmanager
def open_log(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[Path]:
    """Send this process's logging to `folder/rank-R.log` and, on rank 0, to the console; yield the file's path.

    The folder is made, and a file of an earlier start is continued. With several ranks the rest of this process's
    output goes to the file too, until the process ends. Ranks other than 0 send all output there. Rank 0 sends only the
    output of C++: the communication library prints messages when peers leave. A passing exception is logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = log_path(folder, rank)
    if world_size > 1:
        _redirect_output(path, python_too=rank != 0)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s"))
    handlers = [to_file, _ConsoleHandler()] if rank == 0 else [to_file]
    package_logger = logging.getLogger("counterflow")
    level = package_logger.level
    package_logger.setLevel(logging.INFO)
    for handler in handlers:
        logging.getLogger().addHandler(handler)
    try:
        yield path
    except Exception:
        # For the file alone: the caller shows the exception.
        record = package_logger.makeRecord(
            package_logger.name, logging.ERROR, __file__, 0, "failed", (), sys.exc_info()
        )
        to_file.handle(record)
        raise
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        package_logger.setLevel(level)


class _ConsoleHandler(logging.Handler):
    """Handler that writes to the current `sys.stderr`: a progress bar replaces it and shows lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(prefix + self.format(record), file=sys.stderr)


def _redirect_output(path: Path, python_too: bool) -> None:
    """Send file descriptors 1 and 2 to `path`; without `python_too`, print and Python's stderr keep the console."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not python_too:
        sys.stdout = _copy(STDOUT, sys.stdout.encoding)
        sys.stderr = _copy(STDERR, sys.stderr.encoding)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, STDOUT)
    os.dup2(log, STDERR)
    os.close(log)
    if python_too:
        # Line-buffered: with a file's block buffer, kill -9 would lose the last lines.
        sys.stdout = _copy(STDOUT, "utf-8")
        sys.stderr = _copy(STDERR, "utf-8")
    faulthandler.enable(file=STDERR)


def _copy(descriptor: int, encoding: str) -> TextIO:
    return os.fdopen(os.dup(descriptor), "w", encoding=encoding, errors="backslashreplace", buffering=1)
