"""FP8 in every layout and schedule: results are the single process's, restarts are exact, infinities are found.

With power-of-two scales a value is rounded alike in every tile, so it does not matter that an expert's
tokens share tiles with other tokens in other layouts. What is not quantised is FP32 here, so that differences are
those of the order of sums. Sometimes such a difference moves a value to the next E4M3 value, in one product of the many
thousands in a sum.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterflow.parallel.schedule.catalogue import schedule_names
from counterflow.tests.pool import Pool
from counterflow.tests.training.harness import NUMBERS, Curve, relative, replicas, tiny, train
from counterflow.tests.training.test_non_finite import Plant, plant_and_train
from counterflow.tests.training.test_pipelines import equal_bits

FP8 = ("precision.recipe=fp8", "precision.high=fp32", "model.num_hidden_layers=4", "run.seed=7")
RECOMPUTE = ("none", "v3", "full")
STEPS = 3
# World size, ep, schedule and recompute: every schedule, and every policy with some of them.
LAYOUTS = [
    (2, 1, "1f1b", "none", 1),
    (4, 2, "1f1b", "v3", 1),
    (4, 4, "1f1b", "full", 1),
    *((4, 2, name, RECOMPUTE[number % 3], 2) for number, name in enumerate(sorted(schedule_names()))),
    (4, 1, "zb1p", "none", 4),
]
SHORT = [(4, 2, "dualpipe", "v3", 2), (4, 2, "zb1p", "full", 2)]
assert set(SHORT) <= set(LAYOUTS)
MARKED = [layout if layout in SHORT else pytest.param(*layout, marks=pytest.mark.long) for layout in LAYOUTS]
NAMES = [f"{name}-pp{pp}-ep{ep}-edp{world // ep // pp}-{policy}" for world, ep, name, policy, pp in LAYOUTS]


@pytest.fixture(scope="module")
def alone(pool: Pool, text: Path) -> Curve:
    curve: Curve = pool.run(train, 1, tiny(text, *FP8), 1, STEPS)[0]
    return curve


def test_the_single_process_is_worth_comparing_with(pool: Pool, text: Path, alone: Curve) -> None:
    assert alone.closest_choice > 1e-6, "choose another run.seed: a near tie may fall either way"
    assert alone.numbers[-1]["loss"] < 0.98 * alone.numbers[0]["loss"]
    plain = pool.run(train, 1, tiny(text, *FP8, "precision.recipe=fp32"), 1, STEPS)[0]
    errors = [
        float((gradient - plain.gradients[name]).norm() / plain.gradients[name].norm())
        for name, gradient in alone.gradients.items()
        if plain.gradients[name].any()
    ]
    assert min(errors) > 1e-3, "what is compared is FP8, not FP32"


@pytest.mark.parametrize(("world", "ep", "schedule", "recompute", "pp"), MARKED, ids=NAMES)
def test_layouts_schedules_and_recompute_follow_the_single_process(
    pool: Pool, text: Path, alone: Curve, world: int, ep: int, schedule: str, recompute: str, pp: int
) -> None:
    layout = (f"parallel.pp={pp}", f"parallel.schedule={schedule}", f"memory.recompute={recompute}")
    ranks = pool.run(train, world, tiny(text, *FP8, *layout), ep, STEPS)
    for rank in ranks:
        for found, expected in zip(rank.numbers, alone.numbers, strict=True):
            assert all(relative(found[number], expected[number]) < 1e-5 for number in NUMBERS)
        held = ~rank.biases[0].isnan().any(-1)
        assert torch.equal(torch.stack(rank.biases)[:, held], torch.stack(alone.biases)[:, held]), "experts were chosen"
    found = {name: gradient for rank in ranks for name, gradient in rank.gradients.items()}
    for name, expected in alone.gradients.items():
        assert float((found[name] - expected).norm()) <= 1e-4 * float(expected.norm()), name
    for name, copies in replicas(ranks).items():
        assert all(torch.equal(copies[0], copy) for copy in copies), f"copies of {name} drifted apart"


def test_v3s_fp32_scales_let_the_layout_show(pool: Pool, text: Path, alone: Curve) -> None:
    """Powers of two are the default, because with V3's scales a gradient depends on the tokens that share its tiles."""
    config = tiny(text, *FP8, "precision.scales=v3")
    one, several = pool.run(train, 1, config, 1, 1)[0], pool.run(train, 2, config, 2, 1)
    found = {name: gradient for rank in several for name, gradient in rank.gradients.items()}

    def worst(part: str) -> float:
        pairs = [(found[name], expected) for name, expected in one.gradients.items() if part in name]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.any())

    assert worst("layers.3.mlp.experts.") > 1e-3
    assert worst("layers.3.attention.out") < 1e-4


@pytest.mark.long(claim="tests/training/test_pipelines.py::test_orders_of_overlap_and_recompute_give_the_same_bits")
def test_orders_of_overlap_and_recompute_give_the_same_bits(pool: Pool, text: Path) -> None:
    fixed = ("precision.recipe=fp8", "model.num_hidden_layers=4", "parallel.pp=2", "parallel.schedule=dualpipe")
    given = ["parallel.overlap_order=sequence", "memory.recompute=v3", "memory.recompute=full"]
    defer = "parallel.schedule_options.defer_weights=true"
    curves = [pool.run(train, 4, tiny(text, *fixed, more), 2, 2) for more in (*given, defer)]
    for more, ranks in zip(given, curves, strict=False):
        for found, expected in zip(ranks, curves[0], strict=True):
            assert equal_bits(found, expected), more
    for found, expected in zip(curves[-1], curves[0], strict=True):  # other pairs, so other orders of sums
        assert relative(found.numbers[-1]["loss"], expected.numbers[-1]["loss"]) < 1e-3


@pytest.mark.parametrize("recipe", ["fp8", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_checkpoint_of_either_recipe_goes_on_in_fp8(pool: Pool, text: Path, tmp_path: Path, recipe: str) -> None:
    """Bit for bit in its own recipe; in the other the state is the same and the numbers are near."""
    config = tiny(text, *FP8[2:], "precision.recipe=fp8")
    writer = tiny(text, *FP8[2:], f"precision.recipe={recipe}")
    unbroken = pool.run(train, 2, writer, 2, 4, {2: tmp_path})
    resumed = pool.run(train, 2, config, 2, 4, None, tmp_path / "step-2")
    for found, expected in zip(resumed, unbroken, strict=True):
        if recipe == "fp8":
            assert found.numbers == expected.numbers[2:]
            assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
        else:
            assert 0 < relative(found.numbers[0]["loss"], expected.numbers[2]["loss"]) < 1e-2


PLANTS = [
    Plant(rank, module, backward, value=value)
    for rank, module in ((1, "layers.1.attention_norm"), (3, "layers.2.mlp.experts"))
    for value, backward in ((float("inf"), False), (float("inf"), True), (float("nan"), rank == 1))
]


def test_infinities_that_quantisation_would_hide_are_named(pool: Pool, text: Path) -> None:
    for messages in pool.run(plant_and_train, 4, tiny(text, "precision.recipe=fp8"), PLANTS):
        for message, plant in zip(messages, PLANTS, strict=True):
            assert message.startswith(f"step 1 is not finite: {plant.named}")
