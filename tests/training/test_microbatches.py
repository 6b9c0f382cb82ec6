"""Micro-batches on their device, and Python's garbage during a run."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from counterflow.configs.load import load_config
from counterflow.data.loader import Batch
from counterflow.model.transformer import LossWeights
from counterflow.parallel.groups import Groups
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import make_trainer, tiny
from counterflow.training.garbage import collecting_every
from counterflow.training.microbatches import copies_on, micro_batches_on

CPU, META = torch.device("cpu"), torch.device("meta")


def batches(count: int) -> list[Batch]:
    return [
        Batch(torch.arange(8).view(2, 4) + 10 * index, torch.tensor([True, index % 2 == 0]), (2 * index, 2 * index + 1))
        for index in range(count)
    ]


def test_micro_batches_keep_their_rows_and_their_order() -> None:
    config = load_config("tiny", ["balance.capacity_factor=1.0", "model.n_group=2", "balance.keep_sequences=0.5"])
    given = batches(3)
    made = micro_batches_on(CPU, given, config, LossWeights(1.0, 0.0, 0.0, 0.0, 0.0))
    assert [each.tokens is batch.tokens and each.valid is batch.valid for each, batch in zip(made, given, strict=True)]
    exempt = [row for each in made if each.dropping for row in each.dropping.exempt.tolist()]
    assert len(exempt) == 6 and 0 < sum(exempt) < 6
    evaluated = micro_batches_on(CPU, given, config)
    assert [(each.mtp, each.dropping) for each in evaluated] == [(False, None)] * 3


def test_a_gpu_gets_all_rows_in_one_copy_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied(Exception):
        """The copy to a GPU, which is not here."""

    copies: list[tuple[torch.Size, bool]] = []

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append((self.shape, non_blocking))
        raise Copied

    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    with pytest.raises(Copied):
        copies_on(torch.device("cuda", 0), [batch.tokens for batch in batches(5)])
    assert pinned == [(5, 2, 4)] and copies == [((5, 2, 4), True)]


def test_shapes_alone_are_shapes_of_each_micro_batch() -> None:
    made = copies_on(META, [batch.tokens for batch in batches(3)])
    assert [(each.shape, each.device, each.dtype) for each in made] == [((2, 4), META, torch.int64)] * 3


def test_garbage_is_collected_at_its_steps_alone() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    before, alive = gc.isenabled(), []
    with collecting_every(3) as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        for step in range(1, 8):
            Cycle()
            collect(step)
            alive.append(sum(type(each) is Cycle for each in gc.get_objects()))
        Cycle()
    assert alive == [1, 2, 0, 1, 2, 0, 1]
    assert gc.isenabled() == before and gc.get_freeze_count() == 0
    with collecting_every(None):
        assert gc.isenabled() == before


def _tensors_in_cycles(worker: Worker, text: Path, overrides: list[str]) -> list[str]:
    """Large tensors that only the collector frees after two steps and an evaluation, and one of a planted cycle."""
    trainer = make_trainer(tiny(text, *overrides), worker.world_size, 1)
    trainer.step()
    gc.collect()
    gc.disable()
    try:
        trainer.step()
        trainer.evaluate()
        cycle: list[object] = [torch.zeros(12345)]
        cycle.append(cycle)
        del cycle
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [str(each.shape) for each in gc.garbage if isinstance(each, torch.Tensor) and each.numel() > 64]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        trainer.close()


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["precision.recipe=bf16", "memory.recompute=v3"]),
        (1, ["precision.recipe=fp8", "memory.recompute=none"]),
        (2, ["parallel.pp=2", "precision.recipe=bf16", "memory.recompute=full"]),
    ],
)
def test_a_step_leaves_no_activation_to_the_collector(pool: Pool, text: Path, world: int, overrides: list[str]) -> None:
    assert pool.run(_tensors_in_cycles, world, text, overrides) == [["torch.Size([12345])"]] * world


def _waits_for_a_late_rank(worker: Worker) -> str:
    from counterflow.parallel.layout import Layout

    groups = Groups.create(Layout(2), "cpu", timeout=200.0)
    groups.set_timeout(0.2)
    failed = torch.distributed.distributed_c10d._get_default_store()
    if worker.rank == 1:
        failed.wait(["rank 0 has given up"])
        return ""
    try:
        groups.sum(torch.ones(1))
    except RuntimeError as error:
        failed.set("rank 0 has given up", "")
        return str(error)
    return "the other rank took part"


def test_the_timeout_of_all_groups_can_be_shortened(pool: Pool) -> None:
    assert "imed out" in pool.run(_waits_for_a_late_rank, 2)[0]
