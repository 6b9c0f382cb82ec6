"""How a failed transfer is told: by whom it was waited for, and without the library's advice to its developers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommunicationError(RuntimeError):
    """Ranks that were waited for have gone, or did not come in time; `__cause__` is what the library said."""


@contextmanager
def comm_errors(what: str) -> Iterator[None]:
    """Turn what gloo or NCCL raise within it into a CommunicationError about `what`."""
    try:
        yield
    except CommunicationError:
        raise
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].partition(" This is typically")[0]
        raise CommunicationError(f"{what} failed: {said}") from error
