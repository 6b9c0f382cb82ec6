"""Continuing from a checkpoint: bit for bit in the same layout, within 1e-5 in any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterflow.checkpoint.manifest import read_manifest
from counterflow.configs.config import Config
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import NUMBERS, Runs, make_trainer, relative

# World size and ep of the writer and of the reader: more ranks, fewer, other experts together, one process.
PAIRS = [((1, 1), (4, 2)), ((8, 4), (1, 1)), ((4, 2), (2, 1)), ((2, 2), (4, 4))]
NAMES = [f"{a}-ranks-ep{b}-to-{c}-ranks-ep{d}" for (a, b), (c, d) in PAIRS]
MARKED = [pair if pair == ((4, 2), (2, 1)) else pytest.param(*pair, marks=pytest.mark.long) for pair in PAIRS]


@pytest.mark.parametrize(("world", "ep"), [pytest.param(1, 1, marks=pytest.mark.long), (4, 2)])
def test_in_the_same_layout_every_bit_is_that_of_the_unbroken_run(runs: Runs, world: int, ep: int) -> None:
    resumed = runs.resumed(world, ep, runs.checkpoint(world, ep))
    for unbroken, found in zip(runs.curves(world, ep), resumed, strict=True):
        assert found.numbers[0] == unbroken.numbers[10], "the first step after resume"
        assert found.numbers == unbroken.numbers[10:]
        assert found.validation_loss == unbroken.validation_loss
        assert torch.equal(torch.stack(found.counts), torch.stack(unbroken.counts[10:]))
        assert torch.equal(torch.stack(found.biases), torch.stack(unbroken.biases[10:]))
        assert found.weights.keys() == unbroken.weights.keys()
        assert [name for name, t in found.weights.items() if not torch.equal(t, unbroken.weights[name])] == []


@pytest.mark.parametrize(("writer", "reader"), MARKED, ids=NAMES)
def test_in_another_layout_the_run_goes_on_within_rounding(
    runs: Runs, writer: tuple[int, int], reader: tuple[int, int]
) -> None:
    unbroken = runs.curves(*writer)[0]
    for found in runs.resumed(*reader, runs.checkpoint(*writer), steps=15):
        for one, other in zip(found.numbers, unbroken.numbers[10:15], strict=True):
            assert all(relative(one[number], other[number]) < 1e-5 for number in NUMBERS)
        assert torch.equal(torch.stack(found.counts), torch.stack(unbroken.counts[10:15]))
        assert torch.equal(torch.stack(found.biases), torch.stack(unbroken.biases[10:15]))


def _written_again(worker: Worker, config: Config, ep: int, path: Path, folder: Path) -> dict[str, int]:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.restore(path)
    trainer.save(folder)
    return vars(trainer.progress)


@pytest.mark.parametrize(("writer", "reader"), MARKED, ids=NAMES)
def test_read_and_written_again_elsewhere_the_state_has_the_same_bits(
    pool: Pool, runs: Runs, tmp_path: Path, writer: tuple[int, int], reader: tuple[int, int]
) -> None:
    path = runs.checkpoint(*writer)
    first = read_manifest(path)
    for progress in pool.run(_written_again, reader[0], runs.config, reader[1], path, tmp_path):
        assert progress == {"step": 10, "tokens": 10 * 8 * 16, "sequences": 80}
    again = read_manifest(tmp_path / "step-10")
    assert again.tensors == first.tensors, "names, shapes, formats and checksums of weights, moments and biases"
    assert again.progress == first.progress


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 2), pytest.param(8, 4, marks=pytest.mark.long)])
def test_a_checkpoint_of_the_trainer_names_every_tensor_of_the_network(runs: Runs, world: int, ep: int) -> None:
    attention = [f"attention.{part}" for part in ("q_down", "q_norm", "q_up", "kv_down", "kv_norm", "kv_up", "out")]
    block = ["attention_norm", "mlp_norm", *attention]
    gate = ["mlp.gate", *(f"mlp.shared.{w}" for w in ("w1", "w2", "w3"))]
    moe = [*block, *gate, *(f"mlp.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3"))]
    dense = [*block, *(f"mlp.{w}" for w in ("w1", "w2", "w3"))]
    parameters = ["embedding", "head", "norm", *(f"layers.0.{name}" for name in dense)]
    parameters += [f"{layer}.{name}" for layer in ("layers.1", "layers.2", "mtp.0.block") for name in moe]
    parameters += [f"mtp.0.{name}" for name in ("hidden_norm", "embedding_norm", "project", "norm")]
    biases = [f"weights.{layer}.mlp.gate.bias" for layer in ("layers.1", "layers.2", "mtp.0.block")]
    expected = {f"{part}.{name}" for part in ("weights", "exp_avg", "exp_avg_sq") for name in parameters}
    assert read_manifest(runs.checkpoint(world, ep)).tensors.keys() == expected | set(biases)


def test_steps_of_the_optimizer_are_counted_on(pool: Pool, runs: Runs) -> None:
    """AdamW's bias correction depends on the count: a run that counts from zero again has another first step."""
    found = pool.run(_optimizer_steps, 1, runs.config, runs.checkpoint(1, 1))[0]
    assert found == (10, 11)


def _optimizer_steps(worker: Worker, config: Config, path: Path) -> tuple[int, int]:
    trainer = make_trainer(config, 1, 1)
    trainer.restore(path)
    before = trainer.optimizer.steps
    trainer.step()
    trainer.close()
    return before, trainer.optimizer.steps
