"""Functions for tests of the fused kernels, in separate processes: the interpreter is chosen before Triton's import."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from counterflow.kernels.examples import EXAMPLES
from counterflow.kernels.launch import Launch
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.fp8.triton_worker import Compiled, compile_launch


def interpreted(name: str, *arguments: Any) -> Any:
    """Results of an operation's kernel on CPU tensors, under the interpreter.

    Of an operation without results it is the first argument, to which the kernel adds.
    """
    results = OPERATIONS[name].gpu(*arguments)
    return arguments[0] if results is None else results


def compiled(index: int, capability: int) -> list[Compiled]:
    """Kernels that example number `index` launches, compiled for that compute capability times ten."""
    # Two examples may be one program, and the assembler reports on none that is cached.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ["TRITON_CACHE_DIR"])
    launches: list[Launch] = []
    Launch.run = lambda launch: launches.append(launch)  # type: ignore[method-assign]
    example = EXAMPLES[index]
    OPERATIONS[example.operation].gpu(*example.on("meta"))
    return [compile_launch(f"{example.operation}, {example.case}", launch, capability) for launch in launches]
