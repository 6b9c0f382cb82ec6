"""Attention of widths 192 and 128: the kernel that is taken, its error, its speed, and whether it repeats its bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterflow.model import fused_attention
from counterflow.model.core_attention import attend
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, error, same_bits

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BOUND = 2e-2
"""Bound of the error of results and gradients in BF16."""


def run(setup: Setup, report: Report) -> None:
    with setup.alone():
        heads, length = setup.pick((128, 4096), (2, 32))
        for widths in ((192, 128), (128, 128)):
            _widths(setup, report, heads, length, *widths)
        _kept(setup, report, heads, length)


def _operands(setup: Setup, heads: int, length: int, width: int, width_v: int) -> list[Tensor]:
    """Query, key, value and gradient, with the memory in the order [B, S, A, D], as the model makes them."""
    torch.manual_seed(0)
    made = [torch.randn(1, length, heads, w, device=setup.device) for w in (width, width, width_v, width_v)]
    made[0] *= width**-0.5
    return [x.bfloat16().transpose(1, 2) for x in made]


def _exact(operands: list[Tensor]) -> list[Tensor]:
    """Result and gradients in FP32, a few heads at a time."""
    results: list[list[Tensor]] = []
    for first in range(0, operands[0].shape[1], 8):
        q, k, v, grad = (x[:, first : first + 8].float() for x in operands)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        out = torch.softmax((q @ k.mT).masked_fill(mask, float("-inf")), -1) @ v
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    return [torch.cat(parts, 1) for parts in zip(*results, strict=True)]


def _gradients(operands: list[Tensor], attention: Any) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in operands[:3])
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), operands[3])]


def _widths(setup: Setup, report: Report, heads: int, length: int, width: int, width_v: int) -> None:
    operands, name = _operands(setup, heads, length, width, width_v), f"{width}/{width_v}"
    taken = fused_attention.choose_kernel(*operands[:3]) if not setup.rehearse else None
    report.number(f"kernel taken for {name}", None if taken is None else taken.name)
    exact = _exact(operands)
    flops = 2 * heads * length * length / 2 * (width + width_v)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    fits = setup.pick(("cuDNN", "flash", "memory-efficient"), ("flash", "math"))
    for label in fits:
        try:
            with sdpa_kernel(BACKENDS[label]):
                made, again = (_gradients(operands, sdpa) for _ in range(2))
                forward = setup.milliseconds(lambda: sdpa(*operands[:3]))
                both = setup.milliseconds(lambda: _gradients(operands, sdpa))
        except RuntimeError as refusal:
            report.row("back ends", widths=name, back_end=label, refused=str(refusal).splitlines()[0][:120])
            continue
        off = [error(a, b) for a, b in zip(made, exact, strict=True)]
        report.row(
            "back ends",
            widths=name,
            back_end=label,
            forward_ms=forward,
            backward_ms=both - forward,
            forward_TFLOPS=flops / forward / 1e9,
            backward_TFLOPS=2.5 * flops / max(both - forward, 1e-9) / 1e9,
            error_out=off[0],
            error_dq_dk_dv=off[1:],
            dq_repeats=same_bits(made[1], again[1]),
            dk_dv_repeat=same_bits(made[2:], again[2:]),
        )
        report.check(f"{label} {name} is right", max(off) < BOUND, off)
    own = _gradients(
        operands, lambda q, k, v: attend(q, k, v, lambda _: None)[0].unflatten(2, (heads, -1)).transpose(1, 2)
    )
    off = [error(a, b) for a, b in zip(own, exact, strict=True)]
    report.check(f"the model's attention {name} is right", max(off) < BOUND, off)


def _kept(setup: Setup, report: Report, heads: int, length: int) -> None:
    """The model's attention with its result kept as codes: gradients near those without, memory of both."""
    from counterflow.configs.load import load_config
    from counterflow.fp8.linear import Linear

    operands = _operands(setup, heads, length, 192, 128)
    recipe = load_config("deepseek-v3-671b").precision.make()
    with torch.device(setup.device):
        project = Linear(heads * 128, 64, recipe.linear("attention_out"))
    held = {}
    results = {}
    for name, keep in (("whole", lambda _: None), ("codes", project.keep)):
        q, k, v = (x.detach().requires_grad_() for x in operands[:3])
        before = 0 if setup.rehearse else torch.cuda.memory_allocated()
        out, kept = attend(q, k, v, keep)  # type: ignore[arg-type]
        grad = operands[3].transpose(1, 2).flatten(2)
        held[name] = 0 if setup.rehearse else torch.cuda.memory_allocated() - before - out.nbytes - grad.nbytes
        results[name] = torch.autograd.grad(out, (q, k, v), grad)
        del out, kept
    off = [error(a, b) for a, b in zip(results["codes"], results["whole"], strict=True)]
    report.number(
        "GiB between forward and backward beside the result, whole / codes", [x / 2**30 for x in held.values()]
    )
    report.check("gradients with the result kept as codes are near", max(off) < 0.1, off)
