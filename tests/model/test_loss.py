"""Output head and cross-entropy against torch's, and the memory they need at full vocabulary."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.model import loss as loss_module
from counterflow.model.loss import IGNORED, cross_entropy_sum
from counterflow.tests.model.small import relative_error
from counterflow.weight_gradients import GradientSum, attach_sum


def inputs(
    tokens: int = 37, hidden: int = 24, vocabulary: int = 101, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Hidden states, head weights (logits of order 5) and labels, some of these ignored."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * 5 * hidden**-0.5
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return [x.to(dtype), weight.to(dtype), labels]


def with_gradients(function, x: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Loss and gradients of hidden states and weight; `scale` multiplies the loss before the backward."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = function(x, weight, labels)
    (loss * scale).backward()
    return [loss.detach(), x.grad, weight.grad]


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).double(), labels, ignore_index=IGNORED, reduction="sum")


@pytest.fixture(params=[(2**28, 2**22), (101 * 4 * 10, 101 * 4 * 3), (1, 1)], ids=["one piece", "four pieces", "rows"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of logits per piece and of FP32 rows per block: all at once, pieces with remainders, row by row."""
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", request.param[0])
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", request.param[1])


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("scale", [1.0, 1 / 4096, -3.0])
def test_loss_and_gradients_equal_torch(scale: float) -> None:
    parts = inputs()
    found = with_gradients(cross_entropy_sum, *parts, scale=scale)
    expected = with_gradients(plain, *parts, scale=scale)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    for actual, other in zip(found, expected, strict=True):
        assert relative_error(actual, other) < 2e-6


@pytest.mark.usefixtures("pieces")
def test_bf16_rounds_logits_and_gradients_and_nothing_else() -> None:
    parts = inputs(tokens=64, dtype=torch.bfloat16)
    found = with_gradients(cross_entropy_sum, *parts)
    exact = with_gradients(plain, parts[0].double(), parts[1].double(), parts[2])
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for actual, truth in zip(found, exact, strict=True):
        assert relative_error(actual, truth) < 0.006  # a BF16 number is within 0.004 of the exact one


def test_scaling_the_loss_before_bf16_gradients_loses_nothing() -> None:
    """A mean over 60 million tokens scales by 1e-8; the gradients keep their relative accuracy."""
    parts = inputs(dtype=torch.bfloat16)
    unscaled, scaled = (with_gradients(cross_entropy_sum, *parts, scale=scale) for scale in (1.0, 2.0**-26))
    for a, b in zip(unscaled[1:], scaled[1:], strict=True):
        assert torch.equal(a.float(), b.float() * 2.0**26)


@pytest.mark.usefixtures("pieces")
def test_labels_all_ignored_cost_nothing() -> None:
    x, weight, labels = inputs()
    loss, grad_x, grad_weight = with_gradients(cross_entropy_sum, x, weight, torch.full_like(labels, IGNORED))
    assert loss == 0 and not grad_x.any() and not grad_weight.any()


@pytest.mark.usefixtures("pieces")
def test_hidden_states_of_ignored_positions_do_not_matter() -> None:
    x, weight, labels = inputs()
    kept = labels != IGNORED
    loss, grad_x, grad_weight = with_gradients(cross_entropy_sum, x, weight, labels)
    fewer = with_gradients(cross_entropy_sum, x[kept], weight, labels[kept])
    assert loss.item() == pytest.approx(fewer[0].item(), rel=1e-6)
    assert relative_error(grad_x[kept], fewer[1]) < 1e-6 and not grad_x[~kept].any()
    assert relative_error(grad_weight, fewer[2]) < 1e-6


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: int) -> None:
    parts = inputs()
    expected = with_gradients(cross_entropy_sum, *parts)
    leaves = [part.clone().requires_grad_(index != frozen) for index, part in enumerate(parts[:2])]
    cross_entropy_sum(*leaves, parts[2]).backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, expected[2 - frozen])


class CountOperations(TorchDispatchMode):
    """Counter of the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_without_gradients_only_the_logits_are_computed() -> None:
    x, weight, labels = inputs()
    expected = plain(x, weight, labels)
    weight.requires_grad_()
    with torch.no_grad(), CountOperations() as counter:
        loss = cross_entropy_sum(x, weight, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.requires_grad
    assert counter.products == 1


MEMORY = """
import re, sys, torch
from counterflow.model.loss import cross_entropy_sum

def memory(key):
    with open("/proc/self/status") as status:
        return int(re.search(key + r":\\s+(\\d+) kB", status.read())[1]) * 1024

tokens, hidden, vocabulary = int(sys.argv[1]), 16, 129_280
x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, requires_grad=True)
labels = torch.randint(vocabulary, (tokens,))
cross_entropy_sum(x[:2], weight, labels[:2]).backward()  # libraries have initialised themselves
x.grad = weight.grad = None
before = memory("VmRSS")
cross_entropy_sum(x, weight, labels).backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("tokens", [1536, pytest.param(4096, marks=pytest.mark.long)])
def test_full_vocabulary_costs_less_than_its_logits_in_bf16(tokens: int) -> None:
    """4,096 tokens x 129,280 logits are 2 GiB in FP32 and 1 GiB in BF16."""
    command = [sys.executable, "-P", "-c", MEMORY, str(tokens)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = int(run.stdout)
    print(f"peak above inputs: {peak / 2**20:.0f} MiB")
    assert 0 < peak < tokens * 2**18


@pytest.mark.parametrize("tokens", [3, 15360 * 4096])
def test_bf16_gradients_are_scaled_by_the_mean_over_the_batch_and_not_by_its_rounding(tokens: int) -> None:
    """Rounding of each element errs in both directions; a rounded scale would move all alike, by up to 0.4 %."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(500, 64, generator=generator)).bfloat16()
    labels = torch.randint(0, 500, (256,), generator=generator)
    summed, mean = (
        with_gradients(cross_entropy_sum, hidden, weight, labels, scale=scale) for scale in (1.0, 1 / tokens)
    )
    for a, b in zip(summed[1:], mean[1:], strict=True):
        whole, part = a.double().flatten(), b.double().flatten()
        assert float(part @ whole / (whole @ whole)) * tokens == pytest.approx(1.0, abs=5e-4)


def in_a_pipeline(x: Tensor, weight: Tensor, labels: Tensor, scale: float, summed: bool) -> list[Tensor]:
    """Loss and gradients as `with_gradients` gives them, with the scale known in the forward.

    With `summed` the weight's gradient goes to a sum.
    """
    x, weight = x.detach().clone().requires_grad_(), nn.Parameter(weight.detach().clone())
    told: list[int] = []
    total = GradientSum(torch.zeros(weight.shape), lambda: told.append(1))
    if summed:
        attach_sum(weight, total)
    loss = cross_entropy_sum(x, weight, labels, gradient=scale)
    assert not told, "on a CPU gradients are added in the order of the backwards"
    loss.backward(torch.full_like(loss, scale))
    assert len(told) == summed
    assert (weight.grad is None) == summed
    return [loss.detach(), x.grad, total.buffer if summed else weight.grad]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("summed", [False, True], ids=["autograd", "sum"])
@pytest.mark.parametrize("scale", [1 / 4096, 0.3, 0.0])
def test_a_scale_known_in_the_forward_gives_the_same_bits(scale: float, summed: bool, dtype: torch.dtype) -> None:
    parts = inputs(dtype=dtype)
    found = in_a_pipeline(*parts, scale, summed)
    for actual, expected in zip(found, with_gradients(cross_entropy_sum, *parts, scale=scale), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))


def test_evaluation_leaves_the_sum_alone() -> None:
    x, weight, labels = inputs()
    weight = nn.Parameter(weight)
    total = GradientSum(torch.zeros(weight.shape), lambda: pytest.fail("no gradient was computed"))
    attach_sum(weight, total)
    with torch.no_grad():
        cross_entropy_sum(x, weight, labels, gradient=0.5)
    cross_entropy_sum(x.requires_grad_(), weight, labels).backward()
    assert weight.grad is not None


def test_off_the_cpu_the_forward_adds_to_the_sum_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four pieces: four products. Nothing of V x H is made, and only the gradient of the input is kept."""
    monkeypatch.setattr(loss_module, "GPU_LOGITS_BYTES", 101 * 2 * 10)
    x, weight, labels = (part.to("meta") for part in inputs(dtype=torch.bfloat16))
    head = nn.Parameter(weight)
    told: list[int] = []
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    total = GradientSum(torch.empty(head.shape, device="meta"), lambda: told.append(1))
    attach_sum(head, total)
    with Operations() as operations, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy_sum(x.requires_grad_(), head, labels, gradient=0.5)
        assert told == [1]
        loss.backward()
    assert operations.names.count("counterflow::add_product") == 4
    assert head.numel() not in operations.made
    assert kept == [x.numel()] and told == [1]


class Operations(TorchDispatchMode):
    """Operations that run, and the sizes of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        if isinstance(made, Tensor) and func._schema.returns[0].alias_info is None:
            self.made.append(made.numel())
        return made
