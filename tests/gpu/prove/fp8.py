"""FP8 products: Transformer Engine if there, torch's own with scales of tiles, and the emulation's values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.configs.load import load_config
from counterflow.fp8.quantize import BlockQuantized, quantize
from counterflow.settings import UsageError
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, error, same_bits, trainer

SHAPES = {
    "queries up": (4096, 24576, 1536),
    "attention out": (4096, 7168, 16384),
    "expert up": (8192, 4096, 7168),
    "expert down": (8192, 7168, 2048),
}
"""Rows, columns and contraction of V3's products."""


def run(setup: Setup, report: Report) -> None:
    with setup.alone():
        with report.attempt("quantisation"):
            _quantisers(setup, report)
        for name, shape in SHAPES.items():
            with report.attempt(name):
                _product(setup, report, name, *(shape if not setup.rehearse else (128, 128, 256)))
        with report.attempt("a step in emulated FP8"):
            _step(setup, report, "emulated")
        with report.attempt("Transformer Engine"):
            try:
                _step(setup, report, "te")
            except UsageError as absent:
                report.number("Transformer Engine", str(absent)[:300])


def _quantisers(setup: Setup, report: Report) -> None:
    torch.manual_seed(0)
    x = torch.randn(setup.pick(4096, 16), setup.pick(7168, 256)).bfloat16() * torch.randn(1).exp()
    for tile in ((1, 128), (128, 128)):
        here, there = quantize(x, tile), quantize(x.to(setup.device), tile)
        same = same_bits(here.data, there.data.cpu()) and same_bits(here.scale, there.scale.cpu())
        report.check(f"codes and scales of tiles {tile} are the CPU's", same)


def _parts(x: Tensor, tile: tuple[int, int]) -> BlockQuantized:
    return quantize(x, tile, pow2_scales=False)


def _product(setup: Setup, report: Report, name: str, rows: int, columns: int, inner: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, inner, device=setup.device).bfloat16() for n in (rows, columns))
    exact = x.float() @ weight.float().t()
    plain = setup.milliseconds(lambda: torch.mm(x, weight.t()))
    a, b = _parts(x, (1, 128)), _parts(weight, (128, 128))
    emulated = a.dequantize(torch.float32) @ b.dequantize(torch.float32).t()
    flops = 2 * rows * columns * inner
    row = {"product": name, "BF16_TFLOPS": flops / plain / 1e9, "error_of_codes": error(emulated, exact)}
    if not hasattr(F, "scaled_mm"):
        report.row("products", **row, refused="torch has no scaled_mm")
        return
    call = _scaled(a, b)
    try:
        made = call()
        ms = setup.milliseconds(call)
    except (RuntimeError, NotImplementedError, ValueError) as refusal:
        report.row("products", **row, refused=str(refusal).splitlines()[0][:160])
        report.check(f"{name}: torch multiplies tiles of FP8", setup.rehearse, str(refusal)[:160])
        return
    off = error(made, emulated)
    report.row("products", **row, FP8_TFLOPS=flops / ms / 1e9, error_against_emulation=off)
    report.check(f"{name}: torch's product of tiles is the emulation's", off < 1e-2, off)


def _scaled(a: BlockQuantized, b: BlockQuantized):  # type: ignore[no-untyped-def]
    """Product of rows in tiles of (1, 128) and a weight in tiles of (128, 128), with scales as cuBLAS reads them.

    Scales of rows lie by columns. Scales of the weight have their contraction padded to a multiple of 4, along which
    they lie in memory.
    """
    scales = F.pad(b.scale, (0, -b.scale.shape[1] % 4)).t()
    by_columns = a.scale.t().contiguous().t()
    kind = F.ScalingType
    return lambda: F.scaled_mm(
        a.data,
        b.data.t(),
        by_columns,
        kind.BlockWise1x128,
        scales,
        kind.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _step(setup: Setup, report: Report, backend: str) -> None:
    settings = ["precision.recipe=fp8", f"precision.backend={backend}"]
    wide = [
        "model.hidden_size=256",
        "model.moe_intermediate_size=128",
        "model.q_lora_rank=128",
        "model.kv_lora_rank=128",
    ]
    of = trainer(load_config("tiny", [*settings, *wide]), setup.device)
    losses = [of.step().loss for _ in range(setup.pick(20, 1))]
    of.close()
    report.number(f"{backend}: losses, first and last", [losses[0], losses[-1]])
    report.check(f"{backend}: losses fall", setup.rehearse or losses[-1] < losses[0], losses[-1])
