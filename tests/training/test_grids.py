"""Two grids in one world: nothing communicates on the default group."""

from __future__ import annotations

from pathlib import Path

import torch

from counterflow.configs.config import Config
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import Curve, make_trainer, run_steps, tiny, train


def _half(worker: Worker, configs: list[Config], steps: list[int], folder: Path) -> Curve:
    """The lower and the upper half of the ranks train different runs, of different lengths, at the same time."""
    half = worker.rank // 4
    trainer = make_trainer(configs[half], 4, 2, range(4 * half, 4 * half + 4))
    return run_steps(trainer, steps[half], {2: folder / str(half)})


def test_two_grids_in_one_world_do_not_touch_each_other(pool: Pool, text: Path, tmp_path: Path) -> None:
    configs, steps = [tiny(text, "run.seed=5"), tiny(text, "run.seed=6")], [2, 4]
    both = pool.run(_half, 8, configs, steps, tmp_path)
    for half in range(2):
        by_itself = pool.run(train, 4, configs[half], 2, steps[half])
        for expected, found in zip(by_itself, both[4 * half : 4 * half + 4], strict=True):
            assert found.numbers == expected.numbers
            assert found.validation_loss == expected.validation_loss
            assert torch.equal(torch.stack(found.biases), torch.stack(expected.biases))
            assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
        assert (tmp_path / str(half) / "step-2" / "manifest.json").exists()
    assert both[0].numbers[0] != both[4].numbers[0]
