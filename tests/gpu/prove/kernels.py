"""Every fused operation of `kernels/`: its kernel's values against its formula, its speed against formula and copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterflow.kernels import examples
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, error, same_bits

TOY = {"TOKENS": 8, "HIDDEN": 128, "HEADS": 2, "ROWS": 16, "INNER": 64, "SHARED_ROWS": 8, "DENSE": 64, "SHARD": 64}
"""Sizes of examples in a rehearsal."""
ELSEWHERE = ("add_product", "fp8_")
"""Operations that other parts compare: `grouped` and `fp8_kernels`."""
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Bounds of the error by the format of a result: a rounding of BF16 where sums come in another order."""


def run(setup: Setup, report: Report) -> None:
    if setup.rehearse:
        for name, size in TOY.items():
            if hasattr(examples, name):
                setattr(examples, name, size)
    with setup.alone():
        for example in examples.EXAMPLES:
            name = f"{example.operation}, {example.case}"
            with report.attempt(name):
                torch.manual_seed(0)
                _compare(setup, report, name, example)
                if not setup.rehearse:
                    torch.cuda.empty_cache()
    shown = {example.operation for example in examples.EXAMPLES}
    without = sorted(name for name in set(OPERATIONS) - shown if not name.startswith(ELSEWHERE))
    report.check("every operation has an example", not without, without)


def _compare(setup: Setup, report: Report, name: str, example: Any) -> None:
    operation, device = OPERATIONS[example.operation], setup.device
    call = getattr(torch.ops.counterflow, example.operation).default
    given = example.on(device)
    first, results = _results(call, given)
    again, _ = _results(call, given)
    exact, _ = _results(operation.formula, given)
    report.check(f"{name}: two runs give the same bits", same_bits(first, again))
    worst = 0.0
    for made, right in zip(first, exact, strict=True):
        if made.shape != right.shape:  # partial sums, of as many parts as the kernel has programs
            made, right = made.sum(0), right.sum(0)
        if not made.is_floating_point() or made.element_size() == 1:
            report.check(f"{name}: codes and numbers are the formula's", same_bits(made, right))
            continue
        worst = max(worst, error(made, right))
        report.check(f"{name}: values are the formula's", error(made, right) <= BOUNDS.get(made.dtype, 1e-2), worst)
    del first, again, exact, results
    moved = example.bytes()
    ms = setup.milliseconds(lambda: call(*given))
    plain = setup.milliseconds(lambda: operation.formula(*given), rounds=5)
    report.row(
        "speed",
        operation=name,
        us=ms * 1e3,
        formula_us=plain * 1e3,
        times_faster=plain / ms,
        GB_per_s=moved / ms / 1e6,
        error=worst,
        same_bits=None,
    )


def _results(call: Any, given: Any) -> tuple[list[Tensor], Any]:
    """Tensors that a call returns, or changes: it gets copies of its arguments."""
    copies = _copy(given)
    made = call(*copies)
    if made is None:
        return [
            x for x, before in zip(copies, given, strict=True) if isinstance(x, Tensor) and not same_bits(x, before)
        ], made
    parts = made if isinstance(made, tuple | list) else (made,)
    return [part for part in parts if isinstance(part, Tensor)], made


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    if isinstance(value, tuple | list):
        return type(value)(map(_copy, value))
    return value
