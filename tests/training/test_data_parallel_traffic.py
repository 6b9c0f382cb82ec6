"""Gradients and weights between replicas in whole training steps: overlap changes no bit, BF16 little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.configs.config import Config
from counterflow.parallel.executor import PipelineError
from counterflow.parallel.optimizer import bucket
from counterflow.parallel.optimizer.collectives import Collective
from counterflow.tests.parallel.seen import recorded
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import Curve, make_trainer, parameters, relative, replicas, tiny, train

MANY = ("optim.bucket_mb=0.05", "model.num_hidden_layers=4", "batch.global_sequences=8", "train.evaluate_sequences=4")
"""Several buckets, and micro-batches for every rank of a pipeline."""


class Case(NamedTuple):
    world: int
    ep: int = 1
    more: tuple[str, ...] = ()

    def config(self, text: Path, *overrides: str) -> Config:
        return tiny(text, *MANY, *self.more, *overrides)

    def __str__(self) -> str:
        return "-".join([f"{self.world}-ep{self.ep}", *(each.rpartition(".")[2] for each in self.more)])


PIPELINE = ("parallel.pp=2", "parallel.schedule=dualpipe")
CASES = [
    pytest.param(Case(2), marks=pytest.mark.long),
    pytest.param(Case(4), marks=pytest.mark.long),
    Case(2, ep=2),
    Case(4, ep=2, more=("precision.recipe=bf16", "memory.recompute=full")),
    pytest.param(Case(2, more=PIPELINE), marks=pytest.mark.long),  # both stages twice
    pytest.param(Case(4, ep=2, more=(*PIPELINE, "precision.recipe=fp8")), marks=pytest.mark.long),
    # One embedding on the first and the last rank.
    pytest.param(Case(4, more=("parallel.pp=2", "parallel.schedule=1f1b")), marks=pytest.mark.long),
    # Both ends of the model on one rank.
    pytest.param(Case(4, ep=2, more=("parallel.pp=2", "parallel.schedule=dualpipev")), marks=pytest.mark.long),
]


def _run(worker: Worker, config: Config, ep: int) -> dict[str, Any]:
    """Numbers and weights of three steps with evaluations, of the average too."""
    trainer = make_trainer(config, worker.world_size, ep)
    steps = [trainer.step()]
    evaluated = [trainer.validate()]
    steps += [trainer.step() for _ in range(2)]
    evaluated.append(trainer.validate())
    trainer.close()
    kept = ("loss", "loss_mtp", "loss_balance", "grad_norm", "max_vio")
    numbers = [{name: getattr(step, name) for name in kept} for step in steps]
    return {"numbers": numbers, "evaluated": evaluated, "weights": parameters(trainer)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_overlapped_gathers_train_to_the_same_bits(pool: Pool, text: Path, case: Case) -> None:
    made = [
        pool.run(_run, case.world, case.config(text, "optim.ema_decay=0.5", f"optim.overlap_gather={overlap}"), case.ep)
        for overlap in ("false", "true")
    ]
    for blocking, overlapped in zip(*made, strict=True):
        assert blocking["numbers"] == overlapped["numbers"]
        assert blocking["evaluated"] == overlapped["evaluated"]
        weights: dict[str, Tensor] = overlapped["weights"]
        assert weights.keys() == blocking["weights"].keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in blocking["weights"].items())


def _waits(worker: Worker, config: Config, ep: int) -> list[list[int]]:
    """Gathers of the second step, and how many of them have been waited for at each block's attention."""
    trainer = make_trainer(config, worker.world_size, ep)
    with recorded() as seen:
        trainer.step()
        gathers = [number for number, launch in enumerate(seen.launches, 1) if launch.kind == "gather"]
        at: list[int] = []
        blocks = [block for chunk in trainer.model.chunks.values() for block in chunk.layers.values()]
        handles = [
            block.attention.register_forward_pre_hook(lambda *_: at.append(len(seen.events)))  # type: ignore[union-attr]
            for block in blocks
        ]
        trainer.step()
        for handle in handles:
            handle.remove()
    trainer.close()
    before = [sum(-event in gathers for event in seen.events[:place]) for place in at]
    return [gathers, before[: len(blocks)]]


def test_each_block_waits_for_its_own_weights(pool: Pool, text: Path) -> None:
    for gathers, before in pool.run(_waits, 2, Case(2).config(text, "optim.bucket_mb=0.01"), 1):
        assert len(gathers) > 8
        assert sorted(set(before)) == before and len(before) == 4, "each block of the first forward waits for more"
        assert 0 < before[0] < before[-1] < len(gathers), "and the head, and MTP, for what is left"


class Held:
    """All-gather that is launched only when it is waited for, after a call of `before`."""

    def __init__(self, before: Callable[[], None], launch: Callable[[], Collective]) -> None:
        self._before, self._launch = before, launch

    def wait(self) -> Tensor:
        self._before()
        return self._launch().wait()


def _rank_1_is_late(worker: Worker, config: Config) -> tuple[bool, float]:
    """Rank 1 holds its last all-gather back until rank 0 has run attention of the next step's first block."""
    trainer = make_trainer(config, worker.world_size, 1)
    world, token, ran = trainer.groups.world, torch.ones(1), False
    begin, launched = bucket.begin_all_gather, iter(range(1, trainer.optimizer.num_buckets + 1))

    def begin_late(*given: Any) -> Any:
        if next(launched) < trainer.optimizer.num_buckets:
            return begin(*given)
        return Held(lambda: dist.recv(token, 0, group=world), lambda: begin(*given))

    def tell(*_: Any) -> None:
        nonlocal ran
        if not ran:
            ran = True
            dist.send(token, 1, group=world)

    if worker.rank == 1:
        with patch.object(bucket, "begin_all_gather", begin_late):
            trainer.step()
    else:
        trainer.step()
        next(iter(trainer.model.chunks[0].layers.values())).attention.register_forward_hook(tell)  # type: ignore[union-attr]
    loss = trainer.step().loss
    trainer.close()
    return ran, loss


def test_a_forward_begins_before_the_last_gather_could_have_ended(pool: Pool, text: Path) -> None:
    config = Case(2).config(text)
    (ran, loss), (_, same) = pool.run(_rank_1_is_late, 2, config)
    assert ran and loss == same
    assert loss == pool.run(train, 2, config, 1, 2)[0].numbers[1]["loss"]


def _without_a_peer(worker: Worker, config: Config) -> str:
    """Rank 1 ends after its first step, before it has sent the weights that it owns."""
    trainer = make_trainer(config, worker.world_size, 1)
    if worker.rank == 1:
        with patch.object(bucket, "begin_all_gather", lambda *_: object()):
            trainer.step()
        trainer.close()
        return ""
    trainer.step()
    with pytest.raises(PipelineError) as told:
        trainer.step()
    trainer.close()
    return str(told.value)


def test_a_forward_that_waits_for_a_dead_peers_weights_says_so(pool: Pool, text: Path) -> None:
    said = pool.run(_without_a_peer, 2, Case(2).config(text, "parallel.timeout=5"))[0]
    assert said.startswith("pipeline rank 0 in F"), said
    assert "the all-gather of weights over ranks 0, 1 failed: " in said


STEPS = 4
BOUND = 2.5e-3
"""Relative difference of a loss that V3 accepts for FP8 (V3 §3.3). Seen: 7e-4, and 1e-3 in the last evaluation."""


@pytest.mark.parametrize("case", [Case(2), pytest.param(Case(4, ep=2, more=PIPELINE), marks=pytest.mark.long)], ids=str)
def test_gradients_in_bf16_leave_the_losses_close(pool: Pool, text: Path, case: Case) -> None:
    exact, rounded = (
        pool.run(train, case.world, case.config(text, f"optim.reduce={name}"), case.ep, STEPS)
        for name in ("fp32", "bf16")
    )
    curve: Curve
    for one, other in zip(exact[0].numbers, rounded[0].numbers, strict=True):
        assert relative(one["loss"], other["loss"]) < BOUND
    assert exact[0].numbers[0]["loss"] == rounded[0].numbers[0]["loss"], "the first loss has seen no gradient"
    assert exact[0].numbers[-1] != rounded[0].numbers[-1]
    assert relative(exact[0].validation_loss, rounded[0].validation_loss) < BOUND
    for name, copies in replicas(rounded).items():
        assert all(torch.equal(copies[0], copy) for copy in copies), name
    for curve in rounded:
        assert curve.numbers == rounded[0].numbers
