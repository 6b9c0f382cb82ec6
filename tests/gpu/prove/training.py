"""Training on the GPU against training on the CPU: losses, gradients, checkpoints, and layers of V3's width."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup, batches, errors, forward_backward, trainer

CPU = torch.device("cpu")


def run(setup: Setup, report: Report) -> None:
    with setup.alone():
        with report.attempt("tiny in FP32"):
            _tiny(setup, report)
        with report.attempt("a checkpoint moves between devices"):
            _checkpoint(setup, report)
        for recipe, bound in (("fp32", 1e-3), ("bf16", 6e-2)):
            with report.attempt(f"a layer of V3's width in {recipe}"):
                _wide(setup, report, recipe, bound)


def _tiny(setup: Setup, report: Report) -> None:
    steps = setup.pick(10, 2)
    config = load_config("tiny", ["precision.recipe=fp32", "run.seed=2", "model.initializer_range=0.05"])
    ours, theirs = trainer(config, setup.device), trainer(config, CPU)
    worst = 0.0
    for step in range(steps):
        made, exact = ours.step(), theirs.step()
        report.row("tiny", step=step + 1, loss=made.loss, loss_on_CPU=exact.loss, grad_norm=made.grad_norm)
        worst = max(worst, abs(made.loss - exact.loss) / exact.loss)
    report.check("losses of the first steps are the CPU's", worst < 1e-3, worst)
    for each in (ours, theirs):
        each.close()
    bf16 = load_config("tiny", ["precision.recipe=bf16"])
    run = trainer(bf16, setup.device)
    losses = [run.step().loss for _ in range(setup.pick(30, 3))]
    report.check("losses in BF16 fall", losses[-1] < losses[0], [losses[0], losses[-1]])
    report.number("validation loss", run.evaluate())
    run.close()


def _checkpoint(setup: Setup, report: Report) -> None:
    config = load_config("tiny", ["precision.recipe=fp32"])
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(config, setup.device)
        first.step()
        path = first.save(Path(folder))
        onward = first.step().loss
        for device in (CPU, setup.device):
            again = trainer(config, device)
            again.restore(path)
            off = abs(again.step().loss - onward) / onward
            report.check(f"a checkpoint goes on, on the {device.type}", off < 1e-4, off)
            again.close()
        first.close()


def _wide(setup: Setup, report: Report, recipe: str, bound: float) -> None:
    length = setup.pick(256, 16)
    config = setup.wide(
        1,
        f"precision.recipe={recipe}",
        "optim.moments=bf16",
        f"batch.sequence_length={length}",
        "batch.global_sequences=1",
    )
    made = _gradients(config, setup.device)
    exact = _gradients(config if recipe == "fp32" else _in_fp32(config), CPU)
    worst = errors(made, exact)
    report.number(f"largest error of a gradient, {recipe}", worst)
    report.check(f"gradients of a layer of V3's width in {recipe}", max(worst.values()) < bound, worst)


def _in_fp32(config: Config) -> Config:
    precision = config.precision.model_copy(update={"recipe": "fp32"})
    return config.model_copy(update={"precision": precision})


def _gradients(config: Config, device: torch.device) -> dict[str, Tensor]:
    of = trainer(config, device)
    result = forward_backward(of, batches(config, 1)).outputs
    assert all(bool(output.loss.isfinite()) for output in result)
    return {name: tensor.float().cpu().clone() for name, tensor in of.optimizer.gradients().items()}
