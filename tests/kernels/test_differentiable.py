"""Operations with a backward of their own: torch's results, and no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from counterflow.differentiable import Function, once_differentiable, run_backward


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


def test_a_backward_from_an_edge_and_from_a_tensor_is_torchs() -> None:
    x = torch.linspace(-2, 2, 9).requires_grad_()
    first, second = Cube.apply(x, 0.5), Cube.apply(x, 2.0)
    pulls = torch.ones(9), torch.arange(9.0)
    torch.autograd.backward((first, second), pulls, retain_graph=True)
    expected, x.grad = x.grad, None
    run_backward((get_gradient_edge(first), second), pulls)
    assert expected is not None and x.grad is not None and torch.equal(x.grad, expected)
    with pytest.raises(RuntimeError, match="second time"):
        run_backward((second,), pulls[:1])
