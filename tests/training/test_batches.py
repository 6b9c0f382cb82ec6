"""A step is the same however its global batch is cut: unevenly, with padding, with a ramp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.configs.config import Config
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import NUMBERS, Curve, Runs, make_trainer, parameters, relative, tiny, train

# 6 sequences: ranks with 2, 1 and no sequences of their own, and micro-batches that are part padding.
UNEVEN = [(1, 1, 4), (2, 2, 2), (4, 2, 1), (4, 1, 4), pytest.param(8, 4, 1, marks=pytest.mark.long)]
RAMP = "batch.ramp={start: 4, tokens: 512, increment: 2}"


def assert_same_curve(found: Curve, expected: Curve) -> None:
    for one, other in zip(found.numbers, expected.numbers, strict=True):
        for number in NUMBERS:
            assert relative(one[number], other[number]) < 1e-5, number
    assert torch.equal(torch.stack(found.counts), torch.stack(expected.counts))
    assert torch.equal(torch.stack(found.biases), torch.stack(expected.biases))
    assert relative(found.validation_loss, expected.validation_loss) < 1e-5


@pytest.fixture(scope="module")
def of_six(pool: Pool, text: Path) -> Curve:
    return pool.run(train, 1, tiny(text, "batch.global_sequences=6", "train.evaluate_sequences=7"), 1, 3)[0]


@pytest.mark.parametrize(("world", "ep", "micro"), UNEVEN)
def test_padded_micro_batches_give_the_numbers_of_the_whole_batch(
    pool: Pool, text: Path, of_six: Curve, world: int, ep: int, micro: int
) -> None:
    overrides = ("batch.global_sequences=6", "train.evaluate_sequences=7", f"batch.micro_sequences={micro}")
    assert all((counts.sum(1) == 6 * 16 * 2).all() for counts in of_six.counts)
    for rank in pool.run(train, world, tiny(text, *overrides), ep, 3):
        assert_same_curve(rank, of_six)


def test_a_batch_ramp_takes_the_same_steps_in_every_layout(pool: Pool, text: Path) -> None:
    config = tiny(text, RAMP)
    alone = pool.run(train, 1, config, 1, 6)[0]
    # 4 sequences and 2 more at the first step that has half of the ramp's 512 tokens behind it: the fifth.
    sizes = [int(counts[0].sum()) // (16 * 2) for counts in alone.counts]
    assert sizes == [4, 4, 4, 4, 6, 6]
    for rank in pool.run(train, 2, config, 2, 6):
        assert_same_curve(rank, alone)


def test_schedules_are_read_at_the_tokens_before_the_step(pool: Pool, text: Path) -> None:
    overrides = (
        "optim.lr=[{tokens: 256, start: 0, end: 1e-3}, {value: 2e-4}]",
        "balance.bias_update_speed=[{tokens: 256, value: 0.01}, {value: 0}]",
        "train.mtp_weight=[{tokens: 128, value: 0.3}, {value: 0.1}]",
    )
    stepped, weights = pool.run(_scheduled, 1, tiny(text, *overrides))[0]
    assert [step["lr"] for step in stepped] == [0.0, 5e-4, 2e-4, 2e-4]
    assert [step["bias_update_speed"] for step in stepped] == [0.01, 0.01, 0.0, 0.0]
    assert [step["mtp_weight"] for step in stepped] == [0.3, 0.1, 0.1, 0.1]
    assert [step["tokens"] for step in stepped] == [128, 256, 384, 512]
    assert weights == [False, True, True, True], "a learning rate of zero moves nothing"


def _scheduled(worker: Worker, config: Config) -> tuple[list[dict[str, Any]], list[bool]]:
    """Metrics of four steps, and whether each moved the weights."""
    trainer = make_trainer(config, 1, 1)
    steps, moved = [], []
    for _ in range(4):
        before = parameters(trainer)
        steps.append(trainer.step().model_dump())
        moved.append(any(not torch.equal(before[name], tensor) for name, tensor in parameters(trainer).items()))
    trainer.close()
    return steps, moved


def test_biases_move_by_the_speed_against_each_experts_load(runs: Runs) -> None:
    (alone,) = runs.curves(1, 1)
    before = torch.zeros_like(alone.biases[0])
    for counts, biases in zip(alone.counts, alone.biases, strict=True):
        direction = (counts.sum(1, keepdim=True) / counts.shape[1] - counts).sign()
        torch.testing.assert_close(biases, before + 0.02 * direction, rtol=0, atol=1e-7)
        before = biases
