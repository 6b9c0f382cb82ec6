"""Every router trains alike in every layout, with V2's losses and token dropping too; and the bias balances."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.configs.config import Config
from counterflow.report.metrics import StepMetrics
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import biases, make_trainer, relative, run_steps, tiny
from counterflow.training.objective import dropping_of, is_exempt

SOFTMAX = ("model.scoring_func=softmax", "model.norm_topk_prob=false")
LOSSES = ("balance.expert_loss=0.003", "balance.device_loss=0.05", "balance.communication_loss=0.02")  # V2 §3.1.2
DROPS = ("balance.capacity_factor=1.0", "balance.keep_sequences=0.3")
ROUTERS = {
    "V2": ("model.topk_method=group_limited_greedy", *SOFTMAX, *LOSSES, *DROPS),
    "plain": ("model.topk_method=greedy", *SOFTMAX, "balance.expert_loss=0.01", "balance.bias_update_speed=0"),
    "V3 with drops": (*LOSSES, *DROPS),
}
DEEP = ("model.num_hidden_layers=4",)
# World size, ep, sequences of a micro-batch, and further settings.
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "ep2-edp2": (4, 2, 2, ()),
    "ep4-edp2": (8, 4, 1, ("memory.recompute=v3",)),
    "dualpipe": (4, 2, 2, ("parallel.pp=2", "parallel.schedule=dualpipe", "memory.recompute=full")),
}
MEASURED = (
    *("loss", "loss_mtp", "loss_balance", "loss_device", "loss_communication", "grad_norm"),
    *("max_vio", "load_cv", "dropped", "dropped_worst"),
)


def config_of(text: Path, router: str, *more: str) -> Config:
    given = [*DEEP, *ROUTERS[router], *more]
    if "group_limited_greedy" in given[1]:
        given.append("balance.bias_update_speed=0")
    return tiny(text, *given)


def _steps(worker: Worker, config: Config, ep: int, steps: int) -> list[StepMetrics]:
    trainer = make_trainer(config, worker.world_size, ep)
    made = [trainer.step() for _ in range(steps)]
    trainer.close()
    return made


SHORT = [("V2", "dualpipe"), ("plain", "ep2-edp2"), ("V3 with drops", "ep2-edp2")]
PAIRS = [(router, layout) for router in ROUTERS for layout in LAYOUTS]


@pytest.fixture(scope="module")
def alone(pool: Pool, text: Path) -> Callable[[str], list[StepMetrics]]:
    """Metrics of three steps of a router in a single process."""

    @cache
    def made(router: str) -> list[StepMetrics]:
        (steps,) = pool.run(_steps, 1, config_of(text, router), 1, 3)
        return steps

    return made


@pytest.mark.parametrize(
    ("router", "layout"), [pair if pair in SHORT else pytest.param(*pair, marks=pytest.mark.long) for pair in PAIRS]
)
def test_every_router_trains_alike_in_every_layout(
    pool: Pool, text: Path, alone: Callable[[str], list[StepMetrics]], router: str, layout: str
) -> None:
    world, ep, micro, more = LAYOUTS[layout]
    split = config_of(text, router, f"batch.micro_sequences={micro}", *more)
    found = pool.run(_steps, world, split, ep, 3)[0]
    for one, other in zip(alone(router), found, strict=True):
        for name in MEASURED:
            assert relative(getattr(one, name), getattr(other, name)) < 1e-5, name
        assert one.layers is not None and other.layers is not None
        assert (one.layers.max_vio, one.layers.dropped) == (other.layers.max_vio, other.layers.dropped)
        assert (other.rank_vio is not None) == (ep > 1)
        dropped = one.dropped
        assert dropped is not None and (0 < dropped < 0.5) == (router != "plain")


def _with_and_without(worker: Worker, config: Config, other: Config) -> tuple[StepMetrics, StepMetrics, list[float]]:
    """The first step of both configurations, and their validation losses before it."""
    trainers = [make_trainer(each, 1, 1) for each in (config, other)]
    before = [trainer.evaluate() for trainer in trainers]
    first, second = (trainer.step() for trainer in trainers)
    for trainer in trainers:
        trainer.close()
    return first, second, before


def test_evaluation_drops_nothing(pool: Pool, text: Path) -> None:
    config, other = config_of(text, "V2"), config_of(text, "V2", "balance.capacity_factor=null")
    first, second, (with_it, without) = pool.run(_with_and_without, 1, config, other)[0]
    assert with_it == without
    assert first.dropped and second.dropped == 0.0
    assert first.loss != second.loss


def test_exempt_sequences_lose_nothing(pool: Pool, text: Path) -> None:
    config, other = (config_of(text, "V2", f"balance.{key}") for key in ("keep_sequences=1", "capacity_factor=null"))
    first, second, _ = pool.run(_with_and_without, 1, config, other)[0]
    assert first.model_dump(include=set(MEASURED)) == second.model_dump(include=set(MEASURED))


def test_sequences_are_exempt_by_their_number_in_the_run(text: Path) -> None:
    share = sum(is_exempt(1234, number, 0.1) for number in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)  # 4.7 standard deviations
    assert [is_exempt(1, n, 0.1) for n in range(500)] != [is_exempt(2, n, 0.1) for n in range(500)]
    assert not any(is_exempt(1, n, 0.0) for n in range(500)) and all(is_exempt(1, n, 1.0) for n in range(500))


def _exempt(worker: Worker, config: Config, ep: int) -> list[tuple[int, bool]]:
    """Number of every sequence of this rank's first two steps, and whether the sequence is exempt."""
    trainer, found = make_trainer(config, worker.world_size, ep), []
    for _ in range(2):
        for batch in trainer._next_batch()[0]:
            dropping = dropping_of(config, batch)
            assert dropping is not None
            found += [pair for pair in zip(batch.numbers, dropping.exempt.tolist(), strict=True) if pair[0] >= 0]
        trainer.progress = trainer.progress.advanced(8, 16)
    trainer.close()
    return found


def test_the_same_sequences_are_exempt_in_every_layout(pool: Pool, text: Path) -> None:
    config = config_of(text, "V2")
    alone = sorted(pool.run(_exempt, 1, config, 1)[0])
    assert [number for number, _ in alone] == list(range(16))
    assert 0 < sum(exempt for _, exempt in alone) < 16
    uneven = config_of(text, "V2", "batch.micro_sequences=3")
    assert sorted(pair for rank in pool.run(_exempt, 4, uneven, 2) for pair in rank) == alone


def _last_balance(worker: Worker, config: Config, steps: int) -> tuple[float, float]:
    """MaxVio, mean over layers, in the first step and over the last ten."""
    trainer = make_trainer(config, 1, 1)
    found = [trainer.step().max_vio for _ in range(steps)]
    trainer.close()
    return found[0], sum(found[-10:]) / 10


def test_the_bias_alone_balances_and_without_it_nothing_does(pool: Pool, text: Path) -> None:
    """512 tokens per step are few: in perfect balance an expert gets 128, and some get a third more by chance alone."""
    more = ("batch.sequence_length=64", "batch.micro_sequences=8", "optim.lr=3e-4", "model.num_nextn_predict_layers=0")
    fast_then_slow = "balance.bias_update_speed=[{tokens: 20480, value: 0.02}, {value: 0.005}]"
    sides = (
        tiny(text, *more, "balance.expert_loss=0", speed) for speed in (fast_then_slow, "balance.bias_update_speed=0")
    )
    balanced, left_alone = (pool.run(_last_balance, 1, side, 60)[0] for side in sides)
    assert balanced[0] == left_alone[0] > 0.8
    assert balanced[1] < 0.6 and left_alone[1] > 1.5


def _checkpointed(worker: Worker, config: Config, folder: Path) -> tuple[Any, Any]:
    whole = run_steps(make_trainer(config, 1, 1), 2, {1: folder})
    trainer = make_trainer(config, 1, 1)
    trainer.restore(folder / "step-1")
    assert not list(trainer.model.biases()) and torch.isnan(biases(trainer)).all()
    return whole.numbers[1], run_steps(trainer, 2, {}).numbers[0]


def test_a_router_without_bias_resumes(pool: Pool, text: Path, tmp_path: Path) -> None:
    whole, resumed = pool.run(_checkpointed, 1, config_of(text, "V2"), tmp_path)[0]
    assert whole == resumed
