"""Operations of fused kernels: one implementation per kind of device, and one operation to whatever watches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.kernels.op import fused


def _formula(x: Tensor, factor: float) -> Tensor:
    return x * factor + x


def _no_gpu(x: Tensor, factor: float) -> Tensor:
    raise AssertionError("there is no GPU here")


_scale = fused("test_scale(Tensor x, float factor) -> Tensor", _no_gpu, _formula, lambda x, factor: torch.empty_like(x))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_cpu_computes_the_formula_and_meta_only_shapes() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(_scale(x, 2.0), x * 3)
    on_meta = _scale(x.to("meta"), 2.0)
    assert on_meta.is_meta and on_meta.shape == x.shape and on_meta.dtype == x.dtype


def test_a_mode_sees_one_operation() -> None:
    x = torch.empty(2, 3, device="meta")
    with _Names() as seen:
        _scale(x, 2.0)
    assert seen.names == ["counterflow::test_scale"]
