"""Gradients depend neither on the layout, nor on the split into micro-batches, nor on the size of a group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.configs.config import Config
from counterflow.model.counts import count_parameters
from counterflow.model.transformer import LossWeights
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import LAYOUTS, make_trainer, tiny, whole_gradients
from counterflow.training.trainer import Trainer

EVERY = pytest.mark.parametrize(("world", "ep"), LAYOUTS, ids=[f"ep{ep}-edp{w // ep}" for w, ep in LAYOUTS])
# World size, ep and sequences of a micro-batch: a global batch of 8 sequences is 1 to 8 micro-batches per rank.
SPLITS = [
    (1, 1, 8),
    (4, 4, 2),
    (4, 2, 1),
    *(pytest.param(*split, marks=pytest.mark.long) for split in ((1, 1, 4), (2, 1, 1), (8, 4, 1))),
]
ALONE = {
    "next token": LossWeights(token=1 / 128, mtp=0.0, balance=0.0),
    "mtp": LossWeights(token=0.0, mtp=1 / 128, balance=0.0),
    "balance": LossWeights(token=0.0, mtp=0.0, balance=1 / 8),
    "device": LossWeights(token=0.0, mtp=0.0, balance=0.0, device=1 / 8),
    "communication": LossWeights(token=0.0, mtp=0.0, balance=0.0, communication=1 / 8),
}


def batch_gradients(trainer: Trainer, weights: LossWeights) -> dict[str, Tensor]:
    """Gradients of the trainer's next global batch, summed over its ranks: whole tensors this rank's group holds."""
    micro_batches, _ = trainer._next_batch()
    trainer.forward_backward(micro_batches, weights)
    trainer.optimizer.reduce_gradients()
    trainer.close()
    return whole_gradients(trainer)


def _gradients_alone(worker: Worker, config: Config, ep: int) -> dict[str, dict[str, Tensor]]:
    trainer = make_trainer(config, worker.world_size, ep)
    return {loss: batch_gradients(trainer, weights) for loss, weights in ALONE.items()}


def merge(ranks: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Gradients of every loss by the names of the global tensors, from all ranks together."""
    return {loss: {name: t for rank in ranks for name, t in rank[loss].items()} for loss in ranks[0]}


@pytest.fixture(scope="module")
def alone(pool: Pool, text: Path) -> dict[str, dict[str, Tensor]]:
    """Gradients of each loss by itself in a single process, with one sequence per micro-batch."""
    return merge(pool.run(_gradients_alone, 1, tiny(text), 1))


@pytest.mark.parametrize(("world", "ep", "micro"), SPLITS)
def test_gradient_of_each_loss_alone_is_the_same_in_every_layout_and_split(
    pool: Pool, text: Path, alone: dict[str, dict[str, Tensor]], world: int, ep: int, micro: int
) -> None:
    config = tiny(text, f"batch.micro_sequences={micro}")
    found = merge(pool.run(_gradients_alone, world, config, ep))
    for loss, expected in alone.items():
        assert found[loss].keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert float((found[loss][name] - gradient).abs().max()) <= 1e-5 * scale, (loss, name)


def test_each_loss_reaches_what_it_should(alone: dict[str, dict[str, Tensor]]) -> None:
    """The comparison above must not compare zeros."""
    reached = {loss: {name for name, g in gradients.items() if g.abs().max() > 0} for loss, gradients in alone.items()}
    everything = set(alone["mtp"])
    of_mtp = {name for name in everything if name.startswith("mtp.")}
    # The balance losses reach neither the last norm nor anything after routing in the last block.
    assert reached["mtp"] == everything
    assert reached["next token"] == everything - of_mtp
    routers = {name for name in everything if name.endswith(".gate")}
    assert len(routers) == 3
    for loss in ("balance", "device", "communication"):
        assert routers <= reached[loss]
        assert "head" not in reached[loss]
        assert {"layers.0.attention.q_up", "embedding"} <= reached[loss]


def _ones(worker: Worker, config: Config, ep: int) -> float:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.optimizer.begin_step()
    layout = trainer.groups.layout
    for name, parameter in trainer.model.parameters():
        copies = layout.edp if ".experts." in name else layout.dp
        (parameter / copies).sum().backward()
    return trainer.optimizer.reduce_gradients()


@EVERY
def test_gradients_of_one_have_the_norm_of_the_parameter_count(pool: Pool, text: Path, world: int, ep: int) -> None:
    config = tiny(text)
    counts = count_parameters(config.model)
    total = counts.total + counts.mtp_module * config.model.num_nextn_predict_layers
    for norm in pool.run(_ones, world, config, ep):
        assert norm == pytest.approx(math.sqrt(total), rel=1e-12)


def _accumulated_and_plain(worker: Worker, config: Config) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Gradients in the optimizer and sums of plain autograd's, after one and after two micro-batches."""
    trainer = make_trainer(config, 1, 1)
    named = dict(trainer.model.parameters())
    plain = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    found = []
    micro_batches, _ = trainer._next_batch()
    for number, batch in enumerate(micro_batches[:2], start=1):
        out = trainer.model.chunks[0](batch.tokens, batch.valid)
        gradients = torch.autograd.grad(out.loss + out.balance + out.mtp_losses[0], list(named.values()))
        for total, gradient in zip(plain.values(), gradients, strict=True):
            total += gradient
        trainer.forward_backward(micro_batches[:number], LossWeights(1.0, 1.0, 1.0))
        found.append((by_parameter(trainer), {name: total.flatten().clone() for name, total in plain.items()}))
    trainer.close()
    return found


def by_parameter(trainer: Trainer) -> dict[str, Tensor]:
    """The accumulated gradients, flat, by the names of this rank's own parameters."""
    held = trainer.optimizer.gradients()
    placed = {id(item.parameter): item for item in trainer.model.placed()}
    return {
        name: torch.cat([held[part].flatten() for part in placed[id(parameter)].names])
        for name, parameter in trainer.model.parameters()
    }


def test_groups_of_one_change_nothing(pool: Pool, text: Path) -> None:
    for accumulated, plain in pool.run(_accumulated_and_plain, 1, tiny(text))[0]:
        assert accumulated.keys() == plain.keys()
        differ = [name for name in plain if not torch.equal(accumulated[name], plain[name])]
        # Both are used twice in a micro-batch, and the two gradients are added to the sum one by one.
        assert set(differ) <= {"embedding", "head"}
        for name in differ:
            torch.testing.assert_close(accumulated[name], plain[name], rtol=1e-5, atol=1e-6 * plain[name].abs().max())


def _step_and_formula(worker: Worker, config: Config) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of `Trainer.step`, and of the loss written down as V3 does, of the whole global batch at once."""
    trainer = make_trainer(config, 1, 1)
    batches, _ = trainer._next_batch()
    trainer.close()
    tokens = torch.cat([batch.tokens for batch in batches])
    out = trainer.model.chunks[0](tokens)
    positions = 8 * config.batch.sequence_length
    loss = out.loss / positions
    for mtp_loss in out.mtp_losses:
        loss = loss + 0.3 / len(out.mtp_losses) * mtp_loss / positions
    loss = loss + 0.01 * out.balance / 8
    named = dict(trainer.model.parameters())
    formula = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    metrics = trainer.step()
    trainer.close()
    assert metrics.loss_mtp is not None
    return metrics.loss_mtp, by_parameter(trainer), {name: gradient.flatten() for name, gradient in formula.items()}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_has_the_gradient_of_the_formula(pool: Pool, text: Path, depth: int) -> None:
    overrides = ("balance.expert_loss=0.01", "train.mtp_weight=0.3", f"model.num_nextn_predict_layers={depth}")
    mtp_loss, stepped, formula = pool.run(_step_and_formula, 1, tiny(text, *overrides))[0]
    assert mtp_loss == pytest.approx(math.log(320), rel=0.05), "a mean over depths and tokens"
    for name, expected in formula.items():
        assert (stepped[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def _weighted(worker: Worker, config: Config, mtp: float) -> dict[str, Tensor]:
    return batch_gradients(make_trainer(config, 1, 1), LossWeights(1 / 128, mtp / 128, 0.0))


def test_mtp_weight_scales_its_gradient_linearly(pool: Pool, text: Path, alone: dict[str, dict[str, Tensor]]) -> None:
    for weight in (0.1, 0.3):
        found = pool.run(_weighted, 1, tiny(text), weight)[0]
        for name, gradient in found.items():
            expected = alone["next token"][name] + weight * alone["mtp"][name]
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def _with_idle_experts(worker: Worker, config: Config, ep: int) -> tuple[dict[str, Tensor], int]:
    """Gradients when every token goes to the first half of the experts, and the tokens this rank's experts got."""
    trainer = make_trainer(config, worker.world_size, ep)
    received = 0
    for _, router in trainer.model.routers():
        router.bias[:4] = 10.0

    def count(_experts: Any, given: Any, _made: Any) -> None:
        nonlocal received
        received += sum(given[0].tokens_per_expert)

    for name, module in trainer.model.modules():
        if name.endswith("mlp.experts"):
            module.register_forward_hook(count)
    return batch_gradients(trainer, LossWeights(1 / 128, 0.3 / 128, 1e-3)), received


def test_ranks_whose_experts_get_no_token_change_nothing(pool: Pool, text: Path) -> None:
    ((expected, _),) = pool.run(_with_idle_experts, 1, tiny(text), 1)
    ranks = pool.run(_with_idle_experts, 4, tiny(text), 2)
    assert [received > 0 for _, received in ranks] == [True, False, True, False]
    found = {name: gradient for gradients, _ in ranks for name, gradient in gradients.items()}
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert bool(gradient.any()) or ".experts." in name


def _counts_after_a_step(worker: Worker, config: Config) -> tuple[list[Tensor], list[Tensor]]:
    """Every micro-batch's counts as the routers gave them, and the same tensors once the step is done."""
    trainer = make_trainer(config, worker.world_size, 2)
    given: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(_router: Any, _given: Any, routing: Any) -> None:
        given.extend((routing.counts, routing.balance.detach()))
        copies.extend(tensor.clone() for tensor in given[-2:])

    for _, router in trainer.model.routers():
        router.register_forward_hook(keep)
    trainer.step()
    trainer.close()
    return copies, given


def test_collectives_leave_the_ranks_own_statistics_alone(pool: Pool, text: Path) -> None:
    for copies, given in pool.run(_counts_after_a_step, 4, tiny(text)):
        assert len(given) == 2 * 3 * 2, "three routers, two micro-batches"
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, given, strict=True))
        assert all(counts.sum() == 16 * 2 for counts in given[::2]), "tokens of this rank's sequence alone"
