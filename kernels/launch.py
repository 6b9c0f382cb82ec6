"""Launches of Triton kernels as plain objects, and the import of Triton, which is optional."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..settings import UsageError


def load_triton() -> tuple[Any, Any]:
    """The modules `triton` and `triton.language`, for the modules that hold kernels: each is imported when a kernel is
    called. Raises UsageError where Triton is not installed."""
    try:
        return importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError as error:
        raise UsageError(
            f"the fused kernels are written in Triton, which cannot be imported ({error}): install it with "
            "pip install triton (Linux only; PyTorch for CUDA brings it along), or compute without them"
        ) from error


_STREAM: ContextVar[torch.cuda.Stream | None] = ContextVar("stream of launches", default=None)


@contextmanager
def launched_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Context in which kernels run on `stream`, while new tensors get memory of the current stream.

    The caller orders the streams: memory that the current stream has freed may still be in use there.
    """
    token = _STREAM.set(stream)
    try:
        yield
    finally:
        _STREAM.reset(token)


def launch_stream() -> torch.cuda.Stream | None:
    """Stream of `launched_on`; None is the current stream."""
    return _STREAM.get()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on the device of its first tensor; the same object serves to compile it ahead of time."""

    kernel: Any
    programs: int
    arguments: tuple[Tensor | int | float, ...]
    constants: dict[str, Any]  # known when the kernel is compiled
    num_warps: int
    most_registers: int | None = None  # per thread; None leaves the number to the compiler

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. Products and sums are not fused, so no value depends on the compiler's choice."""
        return {"num_warps": self.num_warps, "maxnreg": self.most_registers, "enable_fp_fusion": False}

    def run(self) -> None:
        """Run the kernel, unless it has no programs. Raises UsageError for CPU tensors without Triton's interpreter."""
        if self.programs == 0:
            return
        device = next(argument.device for argument in self.arguments if isinstance(argument, Tensor))
        if device.type == "cuda":
            stream = launch_stream()
            with torch.cuda.device(device) if stream is None else torch.cuda.stream(stream):
                self._start()
            return
        from triton import knobs

        if not knobs.runtime.interpret:
            raise UsageError(
                f"this kernel runs on a GPU and its tensors are on {device}: there, call the plain formula, such as "
                "counterflow.fp8.quantize"
            )
        self._start()

    def _start(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options)
