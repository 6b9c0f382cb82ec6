"""Python's garbage collector during training: at the same steps on all ranks, and at no other time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collecting_every(steps: int | None) -> Iterator[Callable[[int], None]]:
    """Context without automatic collection; yields a function of the step's number that collects every `steps`.

    Left to itself, Python collects at different times on each rank, and in a step all ranks wait for the slowest. What
    is alive at the start, such as modules and configuration, is never looked at. With None nothing is changed.
    """
    if steps is None:
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % steps == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
