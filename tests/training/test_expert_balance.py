"""Experts that change ranks during a run: nothing else changes, with any state and in any layout."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from counterflow.checkpoint.manifest import read_manifest
from counterflow.configs.config import Config
from counterflow.fp8.recipe import Recipe
from counterflow.model.feed_forward import MixtureOfExperts
from counterflow.model.kernels import Kernels
from counterflow.parallel.experts.moves import Moves
from counterflow.parallel.experts.placement import nodes_of_a_group
from counterflow.parallel.layout import Layout
from counterflow.report.text.numbers import format_bytes
from counterflow.settings import UsageError
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import NUMBERS, make_trainer, open_text, relative, tiny
from counterflow.training.build import make_groups
from counterflow.training.preflight import placement_notes
from counterflow.training.trainer import Trainer

# Everything that is kept of an expert, in all its formats, and routing that is uneven enough for experts to move.
# The norm of gradients is a sum over the ranks' parts: where experts change ranks, its last bit of FP64 may change, and
# with it the clipped gradients. So nothing is clipped.
KEPT = ("optim.ema_decay=0.8", "optim.moments=bf16", "balance.bias_update_speed=0", "optim.clip_norm=null")
SMALL = ("model.num_hidden_layers=2", "train.evaluate_sequences=8", *KEPT)
MOVING = ("parallel.expert_placement.every=1", "parallel.expert_placement.gain=0")
STEPS = 3  # experts move before steps 2 and 3; the checkpoint is of step 2


@dataclass
class Seen:
    """Record of one rank in a run, and its tensors at the end."""

    numbers: list[dict[str, float]] = field(default_factory=list)
    ranks: list[Tensor] = field(default_factory=list)
    """`[L, E]` rank of each expert in each step."""
    sent: list[int] = field(default_factory=list)
    """Bytes sent to move experts before each step, counted by the traffic meters of all ranks."""
    validation: dict[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    """Weights, moments and averages: whole tensors, of which this rank holds at least a part."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def run(
    worker: Worker,
    config: Config,
    ep: int,
    resume: Path | None = None,
    save: Path | None = None,
    per_node: int = 8,
) -> Seen:
    """Train three steps, or those after a checkpoint; a checkpoint is written after step 2."""
    seen = Seen()
    handler = logging.Handler()
    handler.emit = lambda record: seen.said.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("counterflow")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    groups = make_groups(config, Layout(worker.world_size, config.parallel.pp, ep, per_node), "cpu")
    trainer = Trainer(config, groups, torch.device("cpu"), open_text(config))
    if resume is not None:
        trainer.restore(resume)
    while trainer.progress.step < STEPS:
        metrics = trainer.step()
        seen.numbers.append({name: getattr(metrics, name) for name in NUMBERS})
        seen.ranks.append(trainer.experts.rank_of_expert)
        seen.sent.append(sum(sent.bytes for sent in metrics.traffic or () if sent.purpose == "experts"))
        if save is not None and metrics.step == 2:
            trainer.save(save)
    ours.removeHandler(handler)
    seen.validation = trainer.validate()
    trainer.close()
    whole = {**trainer.optimizer.state(), **trainer.optimizer.averages()}
    seen.state = {name: gathered(tensor) for name, tensor in whole.items()}
    placed = trainer.model.placed()
    seen.parameters = {n: t.clone() for item in placed for n, t in zip(item.names, item.tensors(), strict=True)}
    return seen


def merged(ranks: list[Seen], what: str) -> dict[str, Tensor]:
    """Global tensors of all ranks; copies of a tensor must be equal."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor in getattr(rank, what).items():
            assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


FP8 = ("precision.recipe=fp8",)
LAYOUTS = {
    "ep2-edp2": (4, 2, ()),
    "ep4": (4, 4, ()),
    "ep2-edp2-dualpipe": (8, 2, ("parallel.pp=2", "parallel.schedule=dualpipe")),
    "ep2-fp8": (2, 2, FP8),
}


SHORT_LAYOUTS = ("ep2-edp2-dualpipe",)


@pytest.mark.parametrize(
    "layout", [name if name in SHORT_LAYOUTS else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_a_run_whose_experts_move_has_the_bits_of_one_whose_experts_stay(pool: Pool, text: Path, layout: str) -> None:
    world, ep, more = LAYOUTS[layout]
    moving = pool.run(run, world, tiny(text, *SMALL, *MOVING, *more), ep)
    staying = pool.run(run, world, tiny(text, *SMALL, *more), ep)
    ranks = moving[0].ranks
    assert torch.equal(ranks[0], staying[0].ranks[-1])
    assert not torch.equal(ranks[1], ranks[0]) and not torch.equal(ranks[2], ranks[1]), "no expert moved"
    for one, other in zip(moving, staying, strict=True):
        assert torch.equal(torch.stack(one.ranks), torch.stack(ranks)), "ranks disagree on where experts are"
        assert one.validation == other.validation and len(one.validation) == 2
        for found, expected in zip(one.numbers, other.numbers, strict=True):
            assert relative(found.pop("grad_norm"), expected.pop("grad_norm")) < 1e-14
            assert found == expected
    for what in ("state", "parameters"):
        found, expected = merged(moving, what), merged(staying, what)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_on_several_nodes_groups_move_as_a_whole(pool: Pool, text: Path) -> None:
    """Two hops add up a node's outputs first, so another placement adds in another order."""
    moving, staying = (
        pool.run(run, 4, tiny(text, *SMALL, "comm.dispatcher=two-hop", "run.seed=4", *more), 4, None, None, 2)
        for more in (MOVING, ())
    )
    nodes = torch.stack(moving[0].ranks) // 2
    assert torch.equal(nodes.unflatten(-1, (4, 2)).amin(-1), nodes.unflatten(-1, (4, 2)).amax(-1)), "a group is split"
    assert not torch.equal(nodes[0], nodes[-1]), "no group moved"
    for found, expected in zip(moving[0].numbers, staying[0].numbers, strict=True):
        assert all(relative(found[number], expected[number]) < 1e-6 for number in NUMBERS)


@pytest.fixture(scope="module")
def unbroken(pool: Pool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Seen], Path]:
    """A run whose experts move, on two ranks, with clipping; and its checkpoint of step 2, which has them moved."""
    folder = tmp_path_factory.mktemp("moved")
    config = tiny(text, *SMALL, *MOVING, "optim.clip_norm=1.0")
    return config, pool.run(run, 2, config, 2, None, folder), folder / "step-2"


def test_a_resumed_run_has_every_bit_of_the_unbroken_one(pool: Pool, unbroken: tuple[Config, list[Seen], Path]) -> None:
    config, ranks, checkpoint = unbroken
    progress = read_manifest(checkpoint).progress
    assert (progress["expert_placement"]["ranks"], progress["expert_placement"]["nodes"]) == (2, 1)
    for found, expected in zip(pool.run(run, 2, config, 2, checkpoint), ranks, strict=True):
        assert found.numbers == expected.numbers[2:]
        assert found.validation == expected.validation
        assert torch.equal(torch.stack(found.ranks), torch.stack(expected.ranks[2:]))
        for what in ("state", "parameters"):
            one, other = getattr(found, what), getattr(expected, what)
            assert one.keys() == other.keys()
            assert [name for name in other if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("world", "ep"), [(1, 1), pytest.param(4, 4, marks=pytest.mark.long), (4, 2)])
def test_another_layout_goes_on_from_moved_experts(
    pool: Pool, unbroken: tuple[Config, list[Seen], Path], world: int, ep: int
) -> None:
    config, ranks, checkpoint = unbroken
    for found in pool.run(run, world, config, ep, checkpoint):
        for one, other in zip(found.numbers, ranks[0].numbers[2:], strict=True):
            assert all(relative(one[number], other[number]) < 1e-5 for number in NUMBERS)
        in_order = "experts begin in their order: the checkpoint has them placed for ep 2 on 1 node, this run has ep"
        assert any(line.startswith(in_order) for line in found.said) == (ep != 2)


def _written_again(worker: Worker, config: Config, ep: int, path: Path, folder: Path) -> None:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.restore(path)
    trainer.save(folder)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4)])
def test_read_and_written_again_moved_experts_have_the_same_bits(
    pool: Pool, unbroken: tuple[Config, list[Seen], Path], tmp_path: Path, world: int, ep: int
) -> None:
    config, _, checkpoint = unbroken
    pool.run(_written_again, world, config, ep, checkpoint, tmp_path)
    first, again = read_manifest(checkpoint), read_manifest(tmp_path / "step-2")
    assert again.tensors == first.tensors, "names, shapes, formats and checksums"
    kept = {**first.progress}
    if ep != 2:
        del kept["expert_placement"]
    assert again.progress == kept


def test_the_log_says_what_moved_and_what_for(unbroken: tuple[Config, list[Seen], Path]) -> None:
    for rank in unbroken[1]:
        lines = [line for line in rank.said if line.startswith("experts: ")]
        assert len(lines) == STEPS - 1
        moved, of = map(int, re.findall(r"\d+", lines[0])[:2])
        was, now, worst_was, worst_now = map(float, re.findall(r"\d\.\d\d", lines[0].partition(";")[2]))
        assert 1.0 <= now < was <= worst_was and now <= worst_now
        each = 3 * 64 * 32 * (4 + 2 + 2 + 4)  # bytes of an expert's weights, moments and average
        crossed = [int((before != after).sum()) for before, after in pairwise(rank.ranks)]
        assert rank.sent == [0, *(each * experts for experts in crossed)]
        assert 0 < crossed[0] <= moved <= of == 16
        assert f" moved, {format_bytes(rank.sent[1])}; busiest rank" in lines[0]


def _loads(worker: Worker, config: Config) -> tuple[list[Any], Tensor]:
    """The loads that checkpoints of steps 1 to 5 have, and the counts of these steps."""
    trainer = make_trainer(config, worker.world_size, 1)
    records, counts = [], []
    measure = trainer.experts.measure
    for _ in range(5):
        with mock.patch.object(trainer.experts, "measure", wraps=measure) as measured:
            trainer.step()
        counts.append(measured.call_args.args[0].clone())
        records.append(trainer.experts.record()["expert_loads"])
    trainer.close()
    return records, torch.stack(counts)


@pytest.mark.parametrize("key", ["checkpoint.every=3", "parallel.expert_placement.every=3"])
def test_loads_are_those_since_the_last_placement_or_checkpoint(pool: Pool, text: Path, key: str) -> None:
    records, counts = pool.run(_loads, 1, tiny(text, *SMALL, key))[0]
    for step, begin in ((1, 0), (2, 0), (3, 0), (4, 3), (5, 3)):
        assert records[step - 1] == {"steps": step - begin, "tokens": counts[begin:step].sum(0).tolist()}


def _evaluations(worker: Worker, config: Config, ep: int) -> tuple[list[dict[str, float]], list[int], bool]:
    """Losses of evaluations with replicas and without, the rows that this rank's experts computed in each, and whether
    training continues as if no evaluation had run."""
    trainer, other = (make_trainer(config, worker.world_size, ep) for _ in range(2))
    for _ in range(2):
        trainer.step()
        other.step()
    rows, losses = [0, 0], []

    def count(_module: Any, given: tuple[Any, ...]) -> None:
        rows[len(losses)] += sum(given[0].tokens_per_expert)

    handles = [layer.experts.register_forward_pre_hook(count) for _, layer in trainer.model.mixtures()]
    losses.append(trainer.validate())
    with mock.patch.object(trainer.experts, "for_evaluation", nullcontext):
        losses.append(trainer.validate())
    for handle in handles:
        handle.remove()
    numbers = [[getattr(each.step(), name) for name in NUMBERS] for each in (trainer, other)]
    for each in (trainer, other):
        each.close()
    return losses, rows, numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("world", "ep", "more"),
    [
        (4, 4, ()),
        pytest.param(4, 2, LAYOUTS["ep2-edp2-dualpipe"][2], marks=pytest.mark.long),
        pytest.param(2, 2, FP8, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_with_replicas_has_the_same_loss_on_evener_ranks(
    pool: Pool, text: Path, world: int, ep: int, more: tuple[str, ...]
) -> None:
    replicas = "parallel.expert_placement.evaluation_replicas=16"
    config = tiny(text, *SMALL, replicas, "train.evaluate_sequences=16", "parallel.expert_placement.every=1", *more)
    ranks = pool.run(_evaluations, world, config, ep)
    for (with_replicas, without), _, undisturbed in ranks:
        for name in ("validation_loss", "validation_loss_ema"):
            assert relative(with_replicas[name], without[name]) < 1e-6
        assert undisturbed
    rows, rows_without = zip(*(rows for _, rows, _ in ranks), strict=True)
    if not more:  # else a pipeline rank has layers of its own, or rows are aligned
        assert sum(rows) == sum(rows_without)
        assert max(rows) < max(rows_without)


@pytest.mark.parametrize(("replicas", "near"), [(9, "8 or 12"), (4, "8"), (14, "12 or 16")])
def test_replicas_that_do_not_fit_are_refused_when_the_configuration_is_read(
    text: Path, replicas: int, near: str
) -> None:
    with pytest.raises(UsageError, match=rf"{replicas} is not a multiple of parallel.ep 4 .* \(nearest: {near}\)"):
        tiny(text, "parallel.ep=4", f"parallel.expert_placement.evaluation_replicas={replicas}")


@given(st.permutations(range(12)), st.permutations(range(12)), st.sampled_from([1, 2, 3, 4, 6]))
def test_what_ranks_send_and_receive_makes_the_new_placement(before: list[int], after: list[int], ranks: int) -> None:
    each = 12 // ranks
    moves = [Moves.between(tuple(before), tuple(after), rank, ranks) for rank in range(ranks)]
    held = [before[rank * each : (rank + 1) * each] for rank in range(ranks)]
    sent = []  # by source, then target
    for mine, move in zip(held, moves, strict=True):
        leaving = iter([mine[place] for place in move.leaving])
        sent.append([[next(leaving) for _ in range(split)] for split in move.send_splits])
    for rank, move in enumerate(moves):
        assert [len(source[rank]) for source in sent] == move.receive_splits
        arrived = [expert for source in sent for expert in source[rank]]
        for place, expert in zip(move.arriving, arrived, strict=True):
            held[rank][place] = expert
    assert [expert for mine in held for expert in mine] == after
    assert sum(map(len, (move.leaving for move in moves))) == sum(a != b for a, b in zip(before, after, strict=True))


def test_tokens_that_go_nowhere_go_nowhere_in_any_placement(text: Path) -> None:
    layer = MixtureOfExperts(tiny(text).model, range(4), _Unused(), Kernels.make(), Recipe())
    ids = torch.tensor([[0, -1], [7, 3]])
    assert layer.place(ids) is ids
    layer.hold((7, 6, 5, 4, 3, 2, 1, 0), 1, 2)
    assert layer.local_experts == (3, 2, 1, 0)
    assert layer.place(ids).tolist() == [[7, -1], [0, 4]]
    layer.hold((7, 6, 5, 4, 3, 3, 2, 1, 0, 3), 1, 2)
    assert layer.local_experts == (3, 2, 1, 0, 3)
    assert layer.place(ids).tolist() == [[8, -1], [0, 5]]
    assert layer.place(torch.tensor([[3], [3], [3], [3], [-1]])).tolist() == [[4], [5], [9], [4], [-1]]
    layer.hold(tuple(range(8)), 1, 2)
    assert layer.place(ids) is ids


class _Unused:
    """Dispatcher that receives no token."""


@pytest.mark.parametrize(
    ("world", "ep", "per_node", "note"),
    [
        (4, 4, 8, None),
        (2, 1, 8, "parallel.expert_placement.every 1 moves nothing: with parallel.ep 1 a rank holds all experts"),
        (8, 4, 6, "groups of 4 ranks lie unevenly on nodes of 6"),
    ],
)
def test_a_run_says_what_moving_experts_cannot_do(
    text: Path, world: int, ep: int, per_node: int, note: str | None
) -> None:
    notes = placement_notes(tiny(text, *MOVING), Layout(world, 1, ep, per_node))
    assert len(notes) == (note is not None) and all(str(note) in line for line in notes)
    assert placement_notes(tiny(text), Layout(world, 1, ep, per_node)) == ()


@pytest.mark.parametrize(
    ("world", "ep", "per_node", "nodes"), [(64, 64, 8, 8), (8, 4, 8, 1), (8, 8, 8, 1), (12, 6, 4, 1), (4, 4, 1, 4)]
)
def test_nodes_of_a_group(world: int, ep: int, per_node: int, nodes: int) -> None:
    assert nodes_of_a_group(Layout(world, 1, ep, per_node)) == nodes
