"""`counterflow verify`: a sound run agrees, a planted fault is found and named, ties are distinguished from faults."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.source import shipped
from counterflow.parallel.groups import Groups
from counterflow.parallel.optimizer.bucket import Bucket
from counterflow.tests.pool import Pool, Worker
from counterflow.training import trainer as trainer_module
from counterflow.training.build import Model, make_groups
from counterflow.training.trainer import Trainer
from counterflow.verify import check as verify_check
from counterflow.verify.check import Attempt, MovedChoices, Outcome, verify_ranks
from counterflow.verify.compare import BF16_REDUCE, TOLERANCES, Difference, moved_choices, parameter_kind
from counterflow.verify.report import body, heading, to_json
from counterflow.verify.run import ChoiceGaps, RankStep, ReferenceStep
from counterflow.verify.shrink import Shrunk, shrink

Plant = Callable[[Groups], None]
"""Function that plants a fault on some of the ranks."""
PIPELINE = ("parallel.pp=2", "parallel.ep=2", "parallel.dp=2", "model.num_hidden_layers=2")


def small(*overrides: str, nproc: int | None = None, steps: int = 2) -> tuple[Config, Shrunk]:
    config = load_config("tiny", [*PIPELINE, *overrides])
    return config, shrink(config, nproc, steps)


def verified(worker: Worker, shrunk: Shrunk, plant: Plant | None = None) -> list[Outcome]:
    """Verify on one rank of the pool, with the faults that `plant` puts on ranks and in trainers."""
    groups = make_groups(shrunk.config, shrunk.layout, "cpu")
    before = Bucket.start_reduce, Trainer.step, trainer_module.update_bias, Model._holders
    try:
        if plant is not None:
            plant(groups)
        return verify_ranks(shrunk, groups)
    finally:
        Bucket.start_reduce, Trainer.step, trainer_module.update_bias, Model._holders = before


def run(pool: Pool, shrunk: Shrunk, plant: Plant | None = None) -> Outcome:
    first, *others = pool.run(verified, shrunk.layout.world_size, shrunk, plant)
    assert others == [[]] * len(others), "rank 0 alone compares"
    return first[0]


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("zb1p", marks=pytest.mark.long)])
def test_a_sound_run_agrees(pool: Pool, schedule: str) -> None:
    config, shrunk = small(f"parallel.schedule={schedule}", "memory.recompute=v3")
    assert shrunk.layout.world_size == 4
    outcome = run(pool, shrunk)
    assert outcome.agrees and outcome.last.first is None
    found = {(each.quantity, each.step) for each in outcome.last.differences}
    quantities = {"number", "gradient", "bias", "weight", "exp_avg", "exp_avg_sq", "copy"}
    assert found == {(quantity, step) for quantity in quantities for step in (1, 2)} | {("plain gradient", 1)}
    errors = [each.error for each in outcome.last.differences if each.quantity == "gradient"]
    assert 0 < max(errors) < 1e-5, "sums in another order are not bit-equal"
    kinds = {each.kind for each in outcome.last.differences if each.quantity == "gradient"}
    expected = {"embedding", "attention", "router", "experts", "shared experts", "dense", "norms", "head", "MTP"}
    assert kinds == expected
    text = "\n".join([heading(config, shrunk), body([outcome], 4)])
    assert max(map(len, text.splitlines())) <= 80 and "fp32: agrees" in text


def test_v2s_router_with_its_losses_and_drops_agrees(pool: Pool) -> None:
    router = ("model.topk_method=group_limited_greedy", "model.scoring_func=softmax", "model.norm_topk_prob=false")
    losses = ("balance.device_loss=0.05", "balance.communication_loss=0.02", "balance.capacity_factor=1.0")
    config, shrunk = small("parallel.schedule=dualpipe", *router, *losses)
    outcome = run(pool, shrunk)
    assert outcome.agrees
    numbers = {each.name for each in outcome.last.differences if each.quantity == "number"}
    assert {"loss_device", "loss_communication"} <= numbers
    assert not any(each.quantity == "bias" for each in outcome.last.differences), "there is none"
    text = "\n".join([heading(config, shrunk), body([outcome], 4)])
    assert max(map(len, text.splitlines())) <= 80 and "communication balance loss" in text


def _scaled_mirror(groups: Groups) -> None:
    """Enlarge the gradients of one tensor of the second layer on pipeline rank 1, before they are summed."""
    start_reduce = Bucket.start_reduce

    def planted(self: Bucket) -> None:
        mirrored = len(self.plan.holders) == 2 and groups.coordinates.pp == 1
        for slot in self.plan.slots:
            if mirrored and slot.local.names == ("layers.1.attention.out",):
                slot.in_bucket(self.gradient).mul_(1.001)
        start_reduce(self)

    Bucket.start_reduce = planted  # type: ignore[method-assign]


def _mtp_counted_twice(groups: Groups) -> None:
    """Let every pipeline rank add its MTP loss's weight."""
    forward_backward = Trainer.forward_backward
    step = Trainer.step

    def planted(self: Trainer) -> Any:
        pp = self.groups.layout.pp

        def scaled(batches: Any, weights: Any, **options: Any) -> Any:
            return forward_backward(self, batches, replace(weights, mtp=weights.mtp * pp), **options)

        self.forward_backward = scaled  # type: ignore[method-assign]
        return step(self)

    Trainer.step = planted  # type: ignore[method-assign]


def _local_counts(groups: Groups) -> None:
    """Let a rank move its biases by its own part of the load."""
    update = trainer_module.update_bias

    def planted(bias: torch.Tensor, counts: torch.Tensor, speed: float) -> None:
        update(bias, counts.flip(0) if groups.rank == 1 else counts, speed)

    trainer_module.update_bias = planted


def _experts_over_one_stage(groups: Groups) -> None:
    """Let each mirrored copy of a stage sum the gradients of its experts alone: the group is too small."""
    holders = Model._holders

    def planted(self: Model, name: str, stage: int) -> tuple[int, ...]:
        held = holders(self, name, stage)
        alone = ".experts." in name and groups.coordinates.pp in held
        return (groups.coordinates.pp,) if alone and len(held) > 1 else held

    Model._holders = planted  # type: ignore[method-assign]


def _stale_copy(groups: Groups) -> None:
    """Let rank 3 keep a router's weights from before the step."""
    step = Trainer.step

    def planted(self: Trainer) -> Any:
        parameter = next(p for n, p in self.model.parameters() if n.endswith(".gate.weight"))
        before = parameter.detach().clone()
        metrics = step(self)
        self.optimizer.finish_gathers()
        if dist.get_world_size(self.groups.world) == 4 and groups.rank == 3:
            parameter.data.copy_(before)
        return metrics

    Trainer.step = planted  # type: ignore[method-assign]


FAULTS = [
    (_scaled_mirror, "gradient", "layers.1.attention.out", (0, 1, 2, 3)),
    (_mtp_counted_twice, "gradient", "mtp.0.norm", (0, 1, 2, 3)),
    (_local_counts, "bias", "layers.1.mlp.gate.bias", (0, 1, 2, 3)),
    (_experts_over_one_stage, "gradient", "mtp.0.block.mlp.experts.", (1, 3)),
    (_stale_copy, "copy", ".mlp.gate", (3,)),
]


@pytest.fixture(scope="module")
def outcome_of(pool: Pool) -> Callable[[Plant], Outcome]:
    """Outcome of one step with a planted fault, verified once."""
    return cache(lambda plant: run(pool, small(steps=1)[1], plant))


@pytest.mark.parametrize(("plant", "quantity", "name", "ranks"), FAULTS, ids=[f[0].__name__[1:] for f in FAULTS])
def test_a_planted_fault_is_named(
    outcome_of: Callable[[Plant], Outcome], plant: Plant, quantity: str, name: str, ranks: tuple[int, ...]
) -> None:
    config, shrunk = small(steps=1)
    outcome = outcome_of(plant)
    first = outcome.last.first
    assert first is not None and not outcome.agrees
    assert (first.step, first.quantity) == (1, quantity) and name in first.name
    assert set(first.ranks) <= set(ranks) and first.ranks
    text = body([outcome], 4)
    assert "fp32: DEPARTS" in text and f"{first.name} (" in text and "step        1" in text
    assert max(map(len, text.splitlines())) <= 80
    as_json = to_json(config, shrunk, [outcome])
    assert as_json["agrees"] is False and as_json["runs"][0]["first_departure"]["name"] == first.name
    json.dumps(as_json, allow_nan=False)


def test_the_size_of_a_departure_is_stated(outcome_of: Callable[[Plant], Outcome]) -> None:
    first = outcome_of(_scaled_mirror).last.first
    assert first is not None and first.kind == "attention"
    # One of two copies that serve half of the micro-batches each is 0.1 % too large.
    assert 1e-4 < first.error < 1e-3 and first.error == first.largest / first.scale


def _counted(rank: int, counts: list[list[int]]) -> RankStep:
    return RankStep(rank, {}, {}, {}, {}, {}, torch.tensor(counts))


def test_moved_choices_are_those_of_the_first_layer_that_differs() -> None:
    gaps = {1: [torch.tensor([[1.0, 1e-7], [1e-6, 1.0], [1e-9, 1e-9]])]}
    alone = ReferenceStep({}, _counted(0, [[4, 4], [5, 3], [2, 6]]), ChoiceGaps(gaps))
    assert moved_choices(alone, [_counted(0, [[4, 1], [2, 3], [1, 6]]), _counted(1, [[0, 3], [3, 0], [1, 0]])]) is None
    assert moved_choices(alone, [_counted(0, [[4, 4], [3, 5], [8, 0]])]) == (1, 2)
    assert alone.choices.near(1, 2e-6, top_k=4) == 4 + 1, "a group moves all of a token's experts, an expert itself"
    assert alone.choices.near(0, 2e-6, top_k=4) == 0
    assert alone.choices.near_balance(2e-6) == 2
    assert alone.choices.closest() == pytest.approx(1e-9)


@pytest.mark.parametrize(("choices", "near", "tie"), [(2, 2, True), (1, 5, True), (3, 2, False), (1, 0, False)])
def test_only_choices_within_rounding_are_a_tie(choices: int, near: int, tie: bool) -> None:
    assert Attempt(1, moved=[MovedChoices(1, 0, choices, near, 1e-8)]).tied is tie


def _tied(worker: Worker, shrunk: Shrunk, ties: int, near: int | None) -> list[Outcome]:
    """Make choices of the first `ties` seeds differ; without `near` they are choices for the balance loss."""
    made: list[Attempt] = []
    attempt = verify_check._attempt

    def planted(small: Shrunk, groups: Groups, *others: Any) -> Attempt | None:
        result = attempt(small, groups, *others)
        assert result is not None
        if len(made) < ties:
            if near is None:
                result.differences.append(Difference(2, "number", "loss_balance", "loss_balance", 1.0, 1.0, 1e-5, (0,)))
                result.near_balance = 1
            else:
                result.moved.append(MovedChoices(2, 1, 1, near, 1e-7))
        made.append(result)
        return result

    verify_check._attempt = planted
    try:
        return verified(worker, shrunk)
    finally:
        verify_check._attempt = attempt


@pytest.mark.parametrize(
    ("ties", "near", "seeds", "says"),
    [
        (1, 2, 2, "trying another seed"),
        (9, 2, 3, "as with all 3 seeds"),
        (9, 0, 1, "so rounding does not explain it"),
        pytest.param(
            *(1, None, 2, "1 choice that the balance loss counts there may come out either way"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_tie_gets_other_seeds_and_a_fault_does_not(
    pool: Pool, ties: int, near: int | None, seeds: int, says: str
) -> None:
    config = load_config("tiny", ["parallel.dp=1"])
    (outcomes,) = pool.run(_tied, 1, shrink(config, 1, 1), ties, near)
    assert [attempt.seed for attempt in outcomes[0].attempts] == [config.run.seed + n for n in range(seeds)]
    assert outcomes[0].agrees is (ties == 1)
    assert says in " ".join(body(outcomes, 1).split())


def test_one_process_is_compared_with_plain_autograd(pool: Pool) -> None:
    config, shrunk = small(nproc=1)
    outcome = run(pool, shrunk)
    assert {each.quantity for each in outcome.last.differences} >= {"plain gradient"} and outcome.agrees
    text = " ".join(body([outcome], 1).split())
    assert "nothing else to compare" in text and "against plain autograd" in heading(config, shrunk)


def test_bf16_is_verified_in_fp32_too(pool: Pool) -> None:
    config = load_config("tiny", ["parallel.dp=2", "precision.recipe=bf16", "optim.moments=bf16"])
    outcomes, _ = pool.run(verified, 2, shrink(config, None, 2))
    assert [(outcome.recipe, outcome.agrees) for outcome in outcomes] == [("bf16", True), ("fp32", True)]
    assert TOLERANCES["fp32"].gradient < TOLERANCES["bf16"].gradient / 100


@pytest.mark.long(claim="test_bf16_is_verified_in_fp32_too")
def test_fp8_is_verified_with_all_else_in_fp32_too(pool: Pool) -> None:
    config = load_config(
        "tiny", ["parallel.pp=2", "parallel.ep=2", "parallel.dp=2", "precision.recipe=fp8", "memory.recompute=v3"]
    )
    outcomes, *_ = pool.run(verified, 4, shrink(config, None, 4))
    assert [(outcome.recipe, outcome.agrees) for outcome in outcomes] == [("fp8", True), ("fp8 on fp32", True)]


def test_gradients_that_travel_in_bf16_are_verified_in_fp32_too(pool: Pool) -> None:
    _, shrunk = small("optim.reduce=bf16")
    outcomes, *_ = pool.run(verified, 4, shrunk)
    assert [(outcome.recipe, outcome.agrees) for outcome in outcomes] == [("fp32, reduce bf16", True), ("fp32", True)]
    rounded, exact = (
        max(each.error for each in outcome.last.differences if each.quantity == "gradient") for outcome in outcomes
    )
    assert 1e-4 < rounded < BF16_REDUCE and exact < 1e-5


@pytest.mark.parametrize("name", shipped())
def test_what_is_shrunk_is_shown_in_80_columns(name: str) -> None:
    config = load_config(name)
    shown = heading(config, shrink(config))
    assert max(map(len, shown.splitlines())) <= 80
    assert "model.hidden_size" in shown and "2 steps" in shown


def test_what_is_missing_or_nan_departs() -> None:
    for largest in (float("inf"), float("nan"), 2e-5):
        assert Difference(1, "gradient", "head", "head", largest, 1.0, 1e-5, ()).departs
    assert not Difference(1, "gradient", "head", "head", 0.0, 0.0, 0.0, ()).departs
    assert Difference(1, "gradient", "head", "head", 1e-30, 0.0, 1e-5, ()).departs, "zero is to be zero"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding", "embedding"),
        ("head", "head"),
        ("norm", "norms"),
        ("layers.0.attention.q_up", "attention"),
        ("layers.0.attention.q_norm", "norms"),
        ("layers.0.mlp.w1", "dense"),
        ("layers.3.mlp.gate", "router"),
        ("layers.3.mlp.gate.bias", "router"),
        ("layers.3.mlp.experts.12.w2", "experts"),
        ("layers.3.mlp.shared.w3", "shared experts"),
        ("mtp.0.block.mlp.experts.12.w2", "MTP"),
    ],
)
def test_parameter_classes(name: str, kind: str) -> None:
    assert parameter_kind(name) == kind


def test_the_command_line_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "counterflow", "verify", "smoke", "--nproc", "2", "--steps", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["agrees"] and result["grid"] == {"ranks": 2, "pp": 1, "ep": 2, "edp": 1}
    assert result["lost"] == ["edp auto is 1 here"]
    assert {"key": "model.hidden_size", "yours": 128, "here": 32, "why": ""} in result["changes"]
    assert list(tmp_path.iterdir()) == [], "no run folder"
