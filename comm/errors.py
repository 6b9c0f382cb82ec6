"""Errors of failed transfers, with the ranks that waited and without the library's advice to its developers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CommunicationError(RuntimeError):
    """Failed transfer: ranks have gone, or did not answer in time; `__cause__` is the library's error."""


@contextmanager
def comm_errors(transfer: str | Callable[[], str]) -> Iterator[None]:
    """Turn an error of gloo or NCCL inside the context into a CommunicationError that names `transfer`.

    A function in place of the name is called on failure only.
    """
    try:
        yield
    except CommunicationError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" This is typically")[0]
        name = transfer if isinstance(transfer, str) else transfer()
        raise CommunicationError(f"{name} failed: {reason}") from error
