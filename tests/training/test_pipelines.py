"""The schedule never changes the result: 8 layers, FP32, MTP, every schedule and layout against a single process.

Three steps; every schedule in one layout in `make test`, in all layouts in `make test-all`. Twenty in `make layouts`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from counterflow.configs.config import Config
from counterflow.model.counts import count_parameters
from counterflow.parallel.schedule.catalogue import schedule_names
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import NUMBERS, Curve, make_trainer, relative, replicas, tiny, train

DEEP = ("model.num_hidden_layers=8", "run.seed=19")
"""Depth, and the seed among the first 40 whose single process stays farthest from a near tie, see `settings`."""
STEPS = int(os.environ.get("COUNTERFLOW_TEST_STEPS", "3"))


class Case(NamedTuple):
    schedule: str
    pp: int
    ep: int
    options: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.pp * self.ep

    def config(self, text: Path, *more: str) -> Config:
        layout = (f"parallel.pp={self.pp}", f"parallel.ep={self.ep}", f"parallel.schedule={self.schedule}")
        return tiny(text, *DEEP, *layout, *self.options, *more)

    def __str__(self) -> str:
        options = "".join(option.rpartition(".")[2] for option in self.options)
        return f"{self.schedule}{'-' * bool(options)}{options}-pp{self.pp}-ep{self.ep}"


DEFER = ("parallel.schedule_options.defer_weights=true",)
CASES = [Case(name, pp, ep) for name in sorted(schedule_names()) for pp, ep in ((2, 1), (2, 2), (4, 1), (4, 2))]
CASES += [Case("dualpipe", 2, 2, DEFER), Case("dualpipev", 4, 1, DEFER)]
DEEP_SCHEDULES = ("dualpipe", "dualpipev", "interleaved")
"""Schedules whose short case is pp 4; for the others it is pp 2 x ep 2."""


def is_short(case: Case) -> bool:
    """Whether `make test` runs the case: one of each schedule, and DualPipe with deferred weight gradients."""
    if case.options:
        return case.schedule == "dualpipe"
    return (case.pp, case.ep) == ((4, 1) if case.schedule in DEEP_SCHEDULES else (2, 2))


def parameters_of(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrization by `cases`; `make test-long` runs those that are not short."""
    marked = [case if is_short(case) else pytest.param(case, marks=pytest.mark.long) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


EVERY = parameters_of(CASES)


class PipelineRuns:
    """Runs of STEPS steps, each made at its first use."""

    def __init__(self, pool: Pool, text: Path) -> None:
        self._pool, self._text = pool, text
        self._curves: dict[Case, list[Curve]] = {}

    def curves(self, case: Case) -> list[Curve]:
        if case not in self._curves:
            self._curves[case] = self._pool.run(train, case.world, case.config(self._text), case.ep, STEPS)
        return self._curves[case]

    @property
    def alone(self) -> Curve:
        return self.curves(Case("1f1b", 1, 1))[0]


@pytest.fixture(scope="module")
def runs(pool: Pool, text: Path) -> PipelineRuns:
    return PipelineRuns(pool, text)


def test_the_single_process_has_no_near_tie(runs: PipelineRuns) -> None:
    assert runs.alone.closest_choice > 1.5e-6, "choose another run.seed: a near tie may fall either way"
    assert runs.alone.numbers[-1]["loss"] < 0.99 * runs.alone.numbers[0]["loss"], "the run is worth comparing"
    assert min(step["grad_norm"] for step in runs.alone.numbers) > 1.0, "gradients are clipped in every step"


@EVERY
def test_losses_and_gradient_norm_follow_the_single_process(runs: PipelineRuns, case: Case) -> None:
    worst_of_all = 0.0
    for rank in runs.curves(case):
        assert len(rank.numbers) == STEPS
        for number in NUMBERS:
            worst = max(relative(a[number], b[number]) for a, b in zip(runs.alone.numbers, rank.numbers, strict=True))
            assert worst <= 1e-5, (number, worst)
            worst_of_all = max(worst_of_all, worst)
        assert relative(rank.validation_loss, runs.alone.validation_loss) <= 1e-5
    print(f"{case}: {STEPS} steps, losses and gradient norm within {worst_of_all:.1e}")


@EVERY
def test_gradients_of_every_parameter_in_the_first_step_are_the_single_processs(runs: PipelineRuns, case: Case) -> None:
    found = {name: gradient for rank in runs.curves(case) for name, gradient in rank.gradients.items()}
    assert found.keys() == runs.alone.gradients.keys()
    for name, expected in runs.alone.gradients.items():
        assert expected.any() or ".experts." in name, name
        assert float((found[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name


@EVERY
def test_counts_and_biases_are_the_single_processs(runs: PipelineRuns, case: Case) -> None:
    expected = torch.stack(runs.alone.biases)
    held = torch.zeros(expected.shape[1], dtype=torch.bool)
    for rank in runs.curves(case):
        assert torch.equal(torch.stack(rank.counts), torch.stack(runs.alone.counts))
        mine = ~rank.biases[0].isnan().any(-1)
        assert torch.equal(torch.stack(rank.biases)[:, mine], expected[:, mine])
        held |= mine
    assert held.all(), "every layer's bias is held by some rank"


@EVERY
def test_copies_of_a_parameter_are_bit_equal_at_the_end(runs: PipelineRuns, case: Case) -> None:
    held = replicas(runs.curves(case))
    assert held.keys() == runs.alone.weights.keys()
    stages = 2 if case.schedule == "dualpipe" else 1  # pipeline ranks that hold a stage
    for name, copies in held.items():
        experts = ".experts." in name
        expected = stages * (1 if experts else case.ep)
        if name == "embedding" and case.schedule not in ("dualpipe", "dualpipev"):
            expected *= 2  # the first rank's layers read it, and the last rank's MTP module
        assert len(copies) == expected, name
        assert all(torch.equal(copies[0], copy) for copy in copies), f"copies of {name} drifted apart"


def _ones(worker: Worker, config: Config, ep: int) -> tuple[float, int, int]:
    """Norm of the whole model's gradients, all of them one; elements of state and of parameters on this rank."""
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.optimizer.begin_step()
    layout = trainer.groups.layout
    copies = {
        id(item.parameter): len(item.holders) * (layout.edp if item.replicas == "edp" else layout.dp)
        for item in trainer.model.placed()
    }
    for _, parameter in trainer.model.parameters():
        (parameter / copies[id(parameter)]).sum().backward()
    kept = sum(t.to_local().numel() for n, t in trainer.optimizer.state().items() if n.startswith("exp_avg."))
    return trainer.optimizer.reduce_gradients(), kept, sum(p.numel() for _, p in trainer.model.parameters())


@parameters_of([case for case in CASES if case.pp == 4 and case.ep == 1])
def test_every_parameter_counts_once_in_the_norm_and_in_the_optimizers_state(
    pool: Pool, text: Path, case: Case
) -> None:
    config = case.config(text)
    counts = count_parameters(config.model)
    total = counts.total + counts.mtp_module * config.model.num_nextn_predict_layers
    found = pool.run(_ones, case.world, config, case.ep)
    for norm, _, _ in found:
        assert norm == pytest.approx(math.sqrt(total), rel=1e-12)
    assert sum(kept for _, kept, _ in found) == total, "two copies of a stage share one state"
    if case.schedule == "dualpipe" and case.ep == 1:
        assert sum(held for _, _, held in found) == 2 * total, "the embedding too, which both ends of the model share"


def _bits(curve: Curve) -> list[Tensor | float]:
    return [*(number for step in curve.numbers for number in step.values()), *curve.gradients.values()]


def equal_bits(one: Curve, other: Curve) -> bool:
    pairs = zip(_bits(one), _bits(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        (Case("dualpipe", 2, 2), "bf16"),
        pytest.param(Case("dualpipev", 2, 2, DEFER), "fp32", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_orders_of_overlap_and_recompute_give_the_same_bits(pool: Pool, text: Path, case: Case, precision: str) -> None:
    """No order of the phases of two micro-batches and no way to keep or rebuild activations changes a bit."""
    alternate = "[F.attention,B.finish,F.dispatch,B.combine,F.shared,B.experts,W,F.experts,B.attention,F.finish]"
    given = [
        ("parallel.overlap_order=sequence",),
        ("parallel.overlap_order=v3",),
        (f"parallel.overlap_order={alternate}",),
        ("memory.recompute=v3",),
        ("memory.recompute=full",),
    ]
    fixed = (f"precision.recipe={precision}", "model.num_nextn_predict_layers=2", "model.num_hidden_layers=4")
    curves = [pool.run(train, case.world, case.config(text, *fixed, *more), case.ep, 2) for more in given]
    for more, ranks in zip(given, curves, strict=True):
        for found, expected in zip(ranks, curves[0], strict=True):
            assert equal_bits(found, expected), more


def _launched(worker: Worker, config: Config, ep: int) -> tuple[int, int]:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.step()
    trainer.close()
    return trainer.optimizer.launched_early, trainer.optimizer.num_buckets


@pytest.mark.parametrize("case", [Case("1f1b", 1, 2), Case("dualpipe", 2, 2), Case("zb1p", 2, 1)], ids=str)
def test_every_gradient_is_on_its_way_when_the_last_backward_ends(pool: Pool, text: Path, case: Case) -> None:
    """The number of gradients that each parameter gets in a step is known, so no bucket waits for the step's end."""
    for launched, buckets in pool.run(_launched, case.world, case.config(text, "optim.bucket_mb=0.05"), case.ep):
        assert buckets > 8
        assert launched == buckets
