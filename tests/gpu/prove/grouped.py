"""Products grouped by expert: values for every split of the rows, empty experts and no rows too, and their speed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from counterflow.fp8.products import Products
from counterflow.kernels.add_product import add_product
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, error, same_bits

BOUND = 5e-3


def run(setup: Setup, report: Report) -> None:
    experts = 4
    width, inner = setup.pick((7168, 2048), (64, 32))
    even = setup.pick(8192, 16)
    splits = {
        "even": [even] * experts,
        "some empty": [0, 2 * even, 0, even],
        "all on one": [0, 0, 4 * even, 0],
        "odd": [1, 127, 3 * even - 13, 5],
        "one row": [0, 1, 0, 0],
        "no row": [0, 0, 0, 0],
    }
    with setup.alone():
        for name, rows in splits.items():
            with report.attempt(name):
                _split(setup, report, name, rows, width, inner)
        with report.attempt("sums of weight gradients"):
            _sums(setup, report, width, inner)


def _split(setup: Setup, report: Report, name: str, rows: list[int], width: int, inner: int) -> None:
    torch.manual_seed(0)
    products, total = Products(widened=False), sum(rows)
    ends = torch.tensor(rows).cumsum(0).int().to(setup.device)
    x, dy = (torch.randn(total, w, device=setup.device).bfloat16() for w in (width, 2 * inner))
    weight = (torch.randn(len(rows), 2 * inner, width, device=setup.device) * width**-0.5).bfloat16()
    calls = {
        "forward": lambda: products.multiply(x, weight.mT, ends),
        "gradient of rows": lambda: products.multiply(dy, weight, ends),
        "gradient of weights": lambda: products.multiply(dy.t(), x, ends),
    }
    parts = [slice(a, b) for a, b in pairwise([0, *torch.tensor(rows).cumsum(0).tolist()])]
    exact: dict[str, list[Tensor]] = {
        "forward": [x[p].float() @ weight[e].float().mT for e, p in enumerate(parts)],
        "gradient of rows": [dy[p].float() @ weight[e].float() for e, p in enumerate(parts)],
        "gradient of weights": [dy[p].float().mT @ x[p].float() for p in parts],
    }
    for kind, call in calls.items():
        made, again = call(), call()
        right = torch.stack(exact[kind]) if made.dim() == 3 else torch.cat(exact[kind])
        off = error(made, right) if right.numel() else float(made.numel())
        ms = setup.milliseconds(call)
        report.row(
            "products",
            rows=name,
            product=kind,
            error=off,
            repeats=same_bits(made, again),
            ms=ms,
            TFLOPS=2 * total * width * 2 * inner / ms / 1e9,
        )
        report.check(f"{kind}, {name}: right", off <= BOUND and bool(made.isfinite().all()), off)
        if made.dim() == 3:
            empty = [float(made[e].float().abs().max()) for e, count in enumerate(rows) if not count]
            report.check(f"{kind}, {name}: experts without rows have zero", not any(empty), empty)


def _sums(setup: Setup, report: Report, width: int, inner: int) -> None:
    """Weight gradients that the product itself adds to FP32 sums."""
    rows = setup.pick(4096, 16)
    x, dy = (torch.randn(rows, w, device=setup.device).bfloat16() for w in (width, inner))
    total = torch.randn(inner, width, device=setup.device)
    exact = total.double() + 0.5 * (dy.double().t() @ x.double())
    made = total.clone()
    add_product(made, dy, x, 0.5)
    off = error(made, exact)
    report.check("an FP32 sum of a product is not rounded to BF16", off < 1e-5, off)
    ms = setup.milliseconds(lambda: add_product(made, dy, x, 0.5))
    report.number("add_product, TFLOP/s", 2 * rows * width * inner / ms / 1e9)
