"""Every fused operation: values against its formula, alone and in real steps; speed against the formula and a copy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import dry_run
from counterflow.kernels import examples
from counterflow.kernels.op import OPERATIONS
from counterflow.tests.gpu.prove.compared import Compared, difference, results
from counterflow.tests.gpu.prove.ranks import together
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, batches, forward_backward, same_bits, trainer

TOY = {"TOKENS": 8, "HIDDEN": 128, "HEADS": 2, "ROWS": 16, "INNER": 64, "SHARED_ROWS": 8, "DENSE": 64, "SHARD": 64}
"""Sizes of examples in a rehearsal."""
BOUND = 1e-2
"""Bound of an error: a rounding of BF16 where sums come in another order."""
ELSEWHERE = "fp8_"
"""Beginning of the names of operations that the part `fp8_kernels` compares."""
STEPS = {
    "BF16, flat": (1, ("precision.recipe=bf16",)),
    "FP8 emulated, flat": (1, ("precision.recipe=fp8", "precision.backend=emulated")),
    "BF16, flat, ep 2": (2, ("precision.recipe=bf16", "parallel.ep=2", "comm.dispatcher=flat")),
    "BF16, two hops": (
        2,
        ("precision.recipe=bf16", "parallel.ep=2", "parallel.gpus_per_node=1", "comm.dispatcher=two-hop"),
    ),
    "FP8 wire, two hops": (
        2,
        (
            "precision.recipe=fp8",
            "precision.backend=emulated",
            "parallel.ep=2",
            "parallel.gpus_per_node=1",
            "comm.dispatcher=two-hop",
        ),
    ),
}


def run(setup: Setup, report: Report) -> None:
    met: set[str] = set()
    for name, (world, settings) in STEPS.items():
        if setup.rehearse and name.startswith("FP8"):
            continue
        with report.attempt(name):
            met |= _met_dry(world, settings) if setup.rehearse else _met(setup, report, name, world, settings)
    if setup.rehearse:
        for name, size in TOY.items():
            setattr(examples, name, size)
    with setup.alone():
        for example in examples.EXAMPLES:
            name = f"{example.operation}, {example.case}"
            with report.attempt(name):
                torch.manual_seed(0)
                _alone(setup, report, name, example)
                if not setup.rehearse:
                    torch.cuda.empty_cache()
    met |= {example.operation for example in examples.EXAMPLES}
    left = sorted(name for name in set(OPERATIONS) - met if not name.startswith(ELSEWHERE))
    report.check("every operation is compared", not left, left)


def _config(settings: tuple[str, ...], length: int = 16) -> Any:
    wide = ("model.hidden_size=256", "model.moe_intermediate_size=128", "model.num_nextn_predict_layers=0")
    sizes = (
        f"batch.sequence_length={length}",
        f"model.max_position_embeddings={max(length, 256)}",
        "memory.recompute=v3",
        "batch.global_sequences=2",
    )
    return load_config("tiny", [*wide, *sizes, *settings])


def _met_dry(world: int, settings: tuple[str, ...]) -> set[str]:
    used = dry_run(_config(settings), world=world, rank=0, layer=False).operations
    return {name.split("::")[-1].split(".")[0 if "::" in name else 1] for name in used}


def _met(setup: Setup, report: Report, name: str, world: int, settings: tuple[str, ...]) -> set[str]:
    """Compare the operations of a step on `world` ranks."""
    rows = together(setup, world, "gloo", _step, settings)[0]
    for row in rows:
        report.row(f"operations of a step, {name}", **row)
    wrong = [row for row in rows if row["error"] > BOUND or not row["same"]]
    report.check(f"{name}: operations are their formulas", not wrong, wrong)
    return {row["operation"] for row in rows}


def _step(settings: tuple[str, ...], setup: Setup) -> list[dict[str, Any]]:
    config = _config(settings, 1024)
    of = trainer(config, setup.device, dist.get_world_size())
    with Compared() as compared:
        forward_backward(of, batches(config, 2))
        of.optimizer.step(1e-3, of.optimizer.reduce_gradients())
    return compared.rows


def _alone(setup: Setup, report: Report, name: str, example: Any) -> None:
    operation = OPERATIONS[example.operation]
    call = getattr(torch.ops.counterflow, example.operation).default
    given = example.on(setup.device)
    first, again, exact = results(call, given), results(call, given), results(operation.formula, given)
    report.check(f"{name}: two runs give the same bits", same_bits(first[0] + first[1], again[0] + again[1]))
    worst, same = difference(first[0] + first[1], exact[0] + exact[1])
    report.check(f"{name}: values are the formula's", worst <= BOUND and same, [worst, same])
    del first, again, exact
    moved, ms = example.bytes(), setup.milliseconds(lambda: call(*given))
    plain = setup.milliseconds(lambda: operation.formula(*given), rounds=5)
    report.row(
        "speed",
        operation=name,
        us=ms * 1e3,
        formula_us=plain * 1e3,
        times_faster=plain / ms,
        GB_per_s=moved / ms / 1e6,
        error=worst,
    )
