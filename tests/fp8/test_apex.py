"""The kernel of NVIDIA's apex: found by a name that no other package has, and used for layers without quantisation."""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from counterflow.fp8 import apex as accumulate
from counterflow.fp8 import linear
from counterflow.fp8.linear import Linear
from counterflow.weight_gradients import WeightQueue, drain


@pytest.fixture(autouse=True)
def _look_again() -> Iterator[None]:
    accumulate.find_accumulate.cache_clear()
    yield
    accumulate.find_accumulate.cache_clear()


def test_the_unrelated_apex_of_pypi_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('this is a toolkit for Pyramid')")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("apex") is not None
    assert accumulate.find_accumulate() is None
    assert "apex" not in sys.modules


def test_a_kernel_built_for_another_torch_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{accumulate.MODULE}.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert accumulate.find_accumulate() is None
    assert "cannot be imported, and is not used: undefined symbol" in caplog.text


class Sums:
    def __init__(self) -> None:
        self.sum = torch.zeros(12, 8)
        self.told = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        return self.sum

    def arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is None
        self.told += 1


def test_gradients_are_added_in_fp32_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with deferred weight gradients. The kernel's own arithmetic can only be tested on a GPU."""
    module = ModuleType(accumulate.MODULE)
    module.wgrad_gemm_accum_fp32 = lambda x, dy, total: total.add_(dy.float().T @ x.float())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, accumulate.MODULE, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(linear, "_accumulate", lambda x: accumulate.find_accumulate())
    layer, sums = Linear(8, 12).to(torch.bfloat16), Sums()
    nn.init.normal_(layer.weight)
    layer.gradients, layer.weight_queue = sums, WeightQueue()
    expected, later = torch.zeros(12, 8), deque[Callable[[], None]]()
    for put_off in (False, True):
        x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(2, 5, 12, dtype=torch.bfloat16)
        with layer.weight_queue.into(later if put_off else None):
            layer(x).backward(dy)
        assert x.grad is not None and torch.equal(x.grad, dy @ layer.weight)
        drain(later)
        expected += dy.flatten(0, 1).float().T @ x.detach().flatten(0, 1).float()
    assert sums.told == 2 and torch.equal(sums.sum, expected)
    layer.gradients = None
    layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None and sums.told == 2


def test_on_a_cpu_autograd_has_them() -> None:
    layer, sums = Linear(8, 12).to(torch.bfloat16), Sums()
    layer.gradients = sums
    layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None and sums.told == 0
