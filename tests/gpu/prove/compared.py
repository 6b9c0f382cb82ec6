"""Fused operations of a real step, each compared with its formula on the same operands."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.kernels.op import NAMESPACE, OPERATIONS
from counterflow.tests.gpu.prove.tools import error, same_bits

CALLS = 6
"""Calls of an operation that are compared, the first ones."""


def results(call: Any, given: Any, named: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that a call on copies of its arguments returns, and the arguments afterwards, which it may change."""
    copies, more = copy(given), copy(named or {})
    made = call(*copies, **more)
    parts = made if isinstance(made, tuple | list) else (made,)
    return [part for part in parts if isinstance(part, Tensor)], [x for x in copies if isinstance(x, Tensor)]


def copy(value: Any) -> Any:
    """`value` with copies of its tensors in the same strides; tensors that overlap themselves become contiguous."""
    if isinstance(value, Tensor):
        if any(stride == 0 for stride in value.stride()):
            return value.contiguous()
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    if isinstance(value, dict):
        return {name: copy(x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(copy, value))
    return value


def difference(made: list[Tensor], exact: list[Tensor]) -> tuple[float, bool]:
    """The largest error of numbers, and whether codes and indices are the same."""
    worst, same = 0.0, len(made) == len(exact)
    for ours, theirs in zip(made, exact, strict=False):
        if ours.shape != theirs.shape and ours.dim() == theirs.dim():  # partial sums, as many as there are programs
            ours, theirs = ours.sum(0), theirs.sum(0)
        if ours.is_floating_point() and ours.element_size() > 1 and ours.shape == theirs.shape:
            worst = max(worst, error(ours, theirs))
        else:
            same = same and same_bits(ours, theirs)
    return worst, same


class Compared(TorchDispatchMode):
    """Mode in which the first calls of every fused operation are run by its formula too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace != NAMESPACE or name not in OPERATIONS or self.calls[name] >= CALLS:
            return func(*args, **(kwargs or {}))
        self.calls[name] += 1
        exact, changed = results(OPERATIONS[name].formula, args, kwargs)
        made = func(*args, **(kwargs or {}))
        parts = [x for x in (made if isinstance(made, tuple | list) else (made,)) if isinstance(x, Tensor)]
        worst, same = difference(parts, exact)
        inputs, same_inputs = difference([x for x in args if isinstance(x, Tensor)], changed)
        shapes = ", ".join("x".join(map(str, x.shape)) for x in args if isinstance(x, Tensor))
        self.rows.append(
            {"operation": name, "operands": shapes, "error": max(worst, inputs), "same": same and same_inputs}
        )
        return made
