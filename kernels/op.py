"""Fused kernels as torch operations, each with one implementation per kind of device.

An operation runs its Triton kernel on a GPU, its formula on a CPU, and makes results without values on the meta device.
To whatever watches torch's dispatcher, such as a dry run, it is one operation: one kernel, its inputs and its results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "counterflow"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Operation:
    """Parts of a fused operation, as they were defined."""

    schema: str
    gpu: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: Callable[..., Any]


OPERATIONS: dict[str, Operation] = {}
"""Every operation that was defined, by name."""


def fused(
    schema: str, gpu: Callable[..., Any], formula: Callable[..., Any], shapes: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the operation `schema`, such as `scale(Tensor x, float factor) -> Tensor`, and return it.

    `gpu` launches a kernel and imports Triton only when it is called. `formula` computes the same values with torch's
    operations. `shapes` makes empty results. All three take the arguments of the schema. Operations have no autograd:
    the functions that call them write their backward out.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    OPERATIONS[name] = Operation(schema, gpu, formula, shapes)
    for key, function in (("CUDA", gpu), ("CPU", formula), ("Meta", shapes)):
        _LIBRARY.impl(name, function, key)
    operation: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operation


def shapes_only(schema: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operation of another library's kernel, for dry runs: it exists on the meta device alone."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, shapes, "Meta")
    operation: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operation
