"""The meta device for timing: what a step lacks there, and operations that cost little more than a dispatch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


class _Attention(torch.autograd.Function):
    """Attention of a fused kernel by its shapes: one operation forward and one backward."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        return value.new_empty(value.shape[0], value.shape[2], value.shape[1], value.shape[3]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors)


@contextmanager
def on_meta(rows_per_expert: int) -> Iterator[None]:
    """Context that gives a step on the meta device what it lacks: counts, an attention kernel, names of memory.

    Checkouts that can run on shapes by themselves keep their own ways.
    """
    from counterflow.model import attention, recompute

    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if not tensor.is_meta:
            return plain(tensor)
        *counts, dropped = torch.full(tensor.shape, rows_per_expert).unbind()
        return [*map(plain, counts), [0] * dropped.numel()]  # the tokens of every expert, and those of none

    with ExitStack() as replaced:
        put = replaced.enter_context
        put(mock.patch.object(torch.Tensor, "tolist", tolist))
        if hasattr(attention, "causal_attention"):
            put(mock.patch.object(attention, "causal_attention", lambda q, k, v, **_: _Attention.apply(q, k, v)))
        if "data_ptr" in inspect.getsource(recompute):
            rebuild = recompute.Rebuild

            def register(self: Any, tensors: tuple[torch.Tensor, ...], recipe: Any) -> None:
                shared = recompute._Recipe(recipe)
                for index, tensor in enumerate(tensors):
                    self._recipes[tensor.untyped_storage()._cdata] = (tensor, shared, index)

            put(mock.patch.object(rebuild, "rebuild", register))
            put(mock.patch.object(rebuild, "rebuilds", lambda self, x: x.untyped_storage()._cdata in self._recipes))
            put(mock.patch.object(recompute, "memory_of", lambda tensor: tensor.untyped_storage()._cdata))
        yield


class _Cheap:
    """Stand-in for an operation on the meta device, where torch works out many shapes in Python, far dearer than a
    dispatch. The shapes of every new kind of call come from a call on zeros on the CPU."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation
        written = [a.name for a in operation._schema.arguments if a.alias_info and a.alias_info.is_write]
        self.written = written[0] if written else None
        self.several = len(operation._schema.returns) > 1
        self.seen: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.written is not None:
            return kwargs.get(self.written, args[0])
        key: list[Any] = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                key += value.shape, value.stride(), value.dtype
            elif isinstance(value, list):
                key += [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in value]
            else:
                key.append(value)
        found = tuple(key)
        specs = self.seen.get(found) or self._run(found, args, kwargs)
        if self.several:
            return tuple(spec and _empty(spec[0], spec[1], dtype=spec[2], device=_META) for spec in specs)
        return _empty(specs[0], specs[1], dtype=specs[2], device=_META)

    def _run(self, key: Any, args: Any, kwargs: Any) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype).zero_()
            if isinstance(value, list):
                return [real(x) for x in value]
            return _CPU if isinstance(value, torch.device) else value

        result = self.operation(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
        specs = [x if x is None else (x.size(), x.stride(), x.dtype) for x in (result if self.several else (result,))]
        self.seen[key] = specs if self.several else specs[0]
        return self.seen[key]


_META, _CPU, _empty = torch.device("meta"), torch.device("cpu"), torch.empty_strided


def cheapen(operations: Iterable[Any]) -> list[torch.library.Library]:
    """Replace operations on the meta device by stand-ins that cost little; they stay while the result lives."""
    cheap: dict[str, _Cheap] = {}
    for function in operations:
        schema = function._schema
        views = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
        lists = any("[]" in str(x.type) for x in schema.returns)
        tensors = any("Tensor" in str(a.type) for a in schema.arguments)
        on_cpu = torch._C._dispatch_has_computed_kernel_for_dispatch_key(function.name(), "CPU")
        if on_cpu and tensors and not views and not lists and schema.returns:
            cheap[function.name()] = _Cheap(function)
    libraries = {name.split("::")[0]: torch.library.Library(name.split("::")[0], "IMPL") for name in cheap}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, stand_in in cheap.items():
            namespace, plain = name.split("::")
            libraries[namespace].m.impl(plain, "Meta", stand_in, False)
    return list(libraries.values())
