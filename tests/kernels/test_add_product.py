"""Products added to FP32 sums: values by the formula, and on the meta device one operation without a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.kernels.add_product import add_product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_product_is_added_in_fp32_unrounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(50, width, generator=generator).to(dtype) for width in (12, 8))
    total = torch.randn(12, 8, generator=generator)
    expected = total.double() - 0.25 * (dy.double().T @ x.double())
    add_product(total, dy, x, -0.25)
    assert torch.allclose(total.double(), expected, rtol=1e-6, atol=1e-5)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_on_meta_it_is_one_operation_of_fitting_shapes() -> None:
    total, dy, x = (torch.empty(size, device="meta") for size in ((12, 8), (5, 12), (5, 8)))
    with _Names() as seen:
        add_product(total, dy, x, 1.0)
    assert seen.names == ["counterflow::add_product"]
    with pytest.raises(AssertionError):
        add_product(total, x, dy, 1.0)
