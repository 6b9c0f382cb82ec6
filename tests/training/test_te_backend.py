"""Training on the Transformer Engine backend: a fake that computes as our emulation does, against that emulation.

Everything around the products is real: pipelines that defer weight gradients, buckets that are reduced when the last
gradient has arrived, dispatch with aligned rows, recomputation, the optimizer's update and checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.configs.config import Config
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import Curve, make_trainer, relative, run_steps, tiny
from counterflow.training.trainer import Trainer

# Widths in multiples of 16, and several micro-batches.
FP8 = ["precision.recipe=fp8", "model.qk_rope_head_dim=16", "batch.sequence_length=32", "memory.recompute=none"]


def config(text: Path, *overrides: str) -> Config:
    return tiny(text, *FP8, *overrides)


@contextlib.contextmanager
def backend(name: str, emulated: bool = True) -> Iterator[Any]:
    """Install a backend: `te` is the fake, `emulated` our emulation with as many rows per expert as the fake gets."""
    from unittest import mock

    from counterflow.fp8.recipe import Recipe
    from counterflow.tests.fp8 import fake_te

    if name == "te":
        with fake_te.installed(emulated):
            yield fake_te
    else:
        with mock.patch.object(Recipe, "alignment", 16):
            yield fake_te


def with_backend(config: Config, name: str) -> Config:
    precision = config.precision.model_copy(update={"backend": name})
    return config.model_copy(update={"precision": precision})


def train(
    worker: Worker,
    config: Config,
    name: str,
    ep: int = 1,
    steps: int = 2,
    save_at: dict[int, Path] | None = None,
    resume: Path | None = None,
    emulated: bool = True,
) -> tuple[Curve, dict[str, Any]]:
    """Record of a run, and the calls of the backend and of the optimizer; for `pool.run`."""
    with backend(name, emulated) as fake:
        trainer: Trainer = make_trainer(with_backend(config, name), worker.world_size, ep)
        assert (trainer.model.recipe.backend is not None) == (name == "te")
        if resume is not None:
            trainer.restore(resume)
        curve = run_steps(trainer, steps, save_at or {})
        seen = {
            "calls": dict(fake.CALLS),
            "first": set(fake.FIRST),
            "early": trainer.optimizer.launched_early,
            "waiting": sum(
                len(module._engine._module.te.store)
                for _, module in trainer.model.modules()
                if getattr(module, "_engine", None) is not None and module._engine._module is not None
            ),
        }
        return curve, seen


def assert_same_bits(found: list[tuple[Curve, Any]], expected: list[tuple[Curve, Any]]) -> None:
    for (mine, seen), (other, seen_there) in zip(found, expected, strict=True):
        assert mine.numbers == other.numbers
        assert mine.validation_loss == other.validation_loss
        assert mine.weights.keys() == other.weights.keys()
        for name, weight in mine.weights.items():
            assert torch.equal(weight, other.weights[name]), name
        assert seen["early"] == seen_there["early"], "an arrival was not told, or too late"
        assert seen["first"] == {None, False} and seen["waiting"] == 0


LAYOUTS = {
    "ep 2, small buckets": (2, 2, ["optim.bucket_mb=0.02"]),
    "zb1p": (2, 1, ["parallel.pp=2", "parallel.schedule=zb1p"]),
    "dualpipe": (2, 1, ["parallel.pp=2", "parallel.schedule=dualpipe"]),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(v, marks=pytest.mark.long if name == "zb1p" else (), id=name) for name, v in LAYOUTS.items()],
)
def test_training_has_the_bits_of_emulation(layout: Any, pool: Pool, text: Path) -> None:
    world_size, ep, overrides = layout
    settings = config(text, *overrides)
    expected = pool.run(train, world_size, settings, "emulated", ep)
    found = pool.run(train, world_size, settings, "te", ep)
    assert_same_bits(found, expected)
    for _, seen in found:
        backwards = seen["calls"]["TransformerEngineBaseModule.backward_dw"]
        assert backwards > 0 and seen["calls"]["GroupedLinear.backward_dw"] > 0
        assert seen["calls"]["FusedAdam.step"] > 0 and seen["calls"]["DotProductAttention.forward"] > 0
        if ep == 2:
            assert seen["early"] > 0
        # Among the forwards of a step's micro-batches, and those of the evaluation, only the first quantises weights.
        assert seen["calls"]["weight quantised"] < seen["calls"]["Linear.forward"]


@pytest.mark.parametrize("policy", ["v3", pytest.param("full", marks=pytest.mark.long)])
def test_recomputation_differs_in_values_far_below_their_tiles_largest(policy: str, pool: Pool, text: Path) -> None:
    """Recomputed inputs are quantised along the rows again, where emulation quantises the input of fprop."""
    settings = config(text, f"memory.recompute={policy}")
    expected = pool.run(train, 2, settings, "emulated", 2)
    found = pool.run(train, 2, settings, "te", 2)
    for (mine, seen), (other, _) in zip(found, expected, strict=True):
        assert seen["waiting"] == 0
        for one, there in zip(mine.numbers, other.numbers, strict=True):
            assert all(relative(one[name], there[name]) < 2e-3 for name in one), (one, there)


def test_as_the_library_computes_the_curve_is_emulations_within_rounding(pool: Pool, text: Path) -> None:
    settings = config(text, "optim.clip_norm=null")  # clipping scales gradients where they lie
    ((expected, _),) = pool.run(train, 1, settings, "emulated")
    ((found, _),) = pool.run(train, 1, settings, "te", 1, 2, None, None, False)
    assert found.numbers[0]["loss"] == expected.numbers[0]["loss"], "the same forward"
    differing = 0
    for name, gradient in expected.gradients.items():
        error = float((found.gradients[name] - gradient).norm())
        assert error <= 2**-8 * float(gradient.norm()), f"{name}: {error / float(gradient.norm())}"
        differing += error > 0
    assert differing > 10, "the fake rounded as emulation does"
    for one, there in zip(found.numbers, expected.numbers, strict=True):
        assert relative(one["loss"], there["loss"]) < 1e-2  # a few choices of experts have come out otherwise


@pytest.mark.parametrize(
    "backends",
    [("emulated", "te"), pytest.param(("te", "emulated"), marks=pytest.mark.long)],
    ids=" to ".join,
)
def test_a_checkpoint_of_one_backend_goes_on_in_the_other(
    backends: tuple[str, str], pool: Pool, text: Path, tmp_path: Path
) -> None:
    """Names, shapes and state are the same, down to BF16 moments."""
    settings = config(text, "optim.moments=bf16")
    writer, reader = backends
    straight = pool.run(train, 2, settings, reader, 2, 3)
    pool.run(train, 2, settings, writer, 2, 2, {2: tmp_path})
    resumed = pool.run(train, 2, settings, reader, 2, 3, None, tmp_path / "step-2")
    for (whole, _), (rest, _) in zip(straight, resumed, strict=True):
        assert rest.numbers == whole.numbers[2:]
        assert all(torch.equal(weight, whole.weights[name]) for name, weight in rest.weights.items())
