"""Operations with a backward of their own: torch's results, and no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.differentiable import Function, once_differentiable


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        assert not torch.is_grad_enabled()
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * grads[0], None


def test_gradients_are_those_of_the_formula() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    y = Cube.apply(x, 0.5)
    assert torch.equal(y, 0.5 * x.detach() ** 3) and y.grad_fn is not None
    assert torch.autograd.gradcheck(lambda x: Cube.apply(x, 0.5), x)
    with torch.no_grad():
        assert not Cube.apply(x, 0.5).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad((Cube.apply(x, 1.0) * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
