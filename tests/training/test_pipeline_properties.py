"""Faults of pipelining that others shipped unnoticed: single losses, odd micro-batches, grids, resume, NaN."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.checkpoint.manifest import read_manifest
from counterflow.configs.config import Config
from counterflow.model.transformer import LossWeights
from counterflow.parallel.executor import PipelineError
from counterflow.tests.pool import Pool, RankFailure, Worker
from counterflow.tests.training.harness import (
    Curve,
    make_trainer,
    relative,
    replicas,
    run_steps,
    tiny,
    train,
    whole_gradients,
)
from counterflow.training.non_finite import NonFiniteError
from counterflow.training.trainer import Trainer

DEEP = ("model.num_hidden_layers=4", "model.num_nextn_predict_layers=2")
AT_ONCE = ("parallel.schedule=1f1b", "parallel.pp=1", "batch.micro_sequences=8")
"""A single process with the global batch in one micro-batch, which takes a fifth of the time of eight."""


def pipeline(text: Path, schedule: str, pp: int, *more: str) -> Config:
    return tiny(text, *DEEP, f"parallel.schedule={schedule}", f"parallel.pp={pp}", *more)


ALONE = {
    "next token": LossWeights(token=1 / 128, mtp=0.0, balance=0.0),
    "mtp": LossWeights(token=0.0, mtp=1 / 128, balance=0.0),
    "balance": LossWeights(token=0.0, mtp=0.0, balance=1 / 8),
    "device": LossWeights(token=0.0, mtp=0.0, balance=0.0, device=1 / 8),
    "communication": LossWeights(token=0.0, mtp=0.0, balance=0.0, communication=1 / 8),
}
# World size, ep, and what is set: schedules, and splits of 8 sequences into micro-batches of 1 to 4.
SPLITS = [
    (4, 1, "1f1b", 4, 2),
    (4, 2, "dualpipe", 2, 1),
    pytest.param(2, 1, "dualpipe", 2, 4, marks=pytest.mark.long),
    pytest.param(2, 1, "dualpipev", 2, 2, marks=pytest.mark.long),
    pytest.param(4, 2, "zb1p", 2, 4, marks=pytest.mark.long),
]


def _gradients_alone(worker: Worker, config: Config, ep: int) -> dict[str, dict[str, Tensor]]:
    trainer = make_trainer(config, worker.world_size, ep)
    found = {}
    for loss, weights in ALONE.items():
        micro_batches, _ = trainer._next_batch()
        trainer.forward_backward(micro_batches, weights)
        trainer.optimizer.reduce_gradients()
        found[loss] = whole_gradients(trainer)
        trainer.close()
    return found


@pytest.fixture(scope="module")
def alone(pool: Pool, text: Path) -> dict[str, dict[str, Tensor]]:
    return pool.run(_gradients_alone, 1, tiny(text, *DEEP, *AT_ONCE), 1)[0]


@pytest.mark.parametrize(("world", "ep", "schedule", "pp", "micro"), SPLITS)
def test_gradient_of_each_loss_alone_does_not_depend_on_the_pipeline(
    pool: Pool, text: Path, alone: dict[str, dict[str, Tensor]], world: int, ep: int, schedule: str, pp: int, micro: int
) -> None:
    config = pipeline(text, schedule, pp, f"batch.micro_sequences={micro}")
    ranks = pool.run(_gradients_alone, world, config, ep)
    for loss, expected in alone.items():
        found = {name: gradient for rank in ranks for name, gradient in rank[loss].items()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (loss, name)


@pytest.mark.parametrize("split", ["[1,1,1,1]", "[1,3]", pytest.param("[3,1]", marks=pytest.mark.long)])
def test_uneven_stages_change_nothing(pool: Pool, text: Path, split: str) -> None:
    stages = split.count(",") + 1
    (expected,) = pool.run(train, 1, tiny(text, *DEEP, *AT_ONCE), 1, 3)
    for rank in pool.run(train, stages, pipeline(text, "dualpipe", stages, f"parallel.split={split}"), 1, 3):
        for a, b in zip(expected.numbers, rank.numbers, strict=True):
            assert all(relative(a[name], b[name]) <= 1e-5 for name in a)


CORNERS = {
    "no shared experts": ("model.n_shared_experts=0",),
    "direct queries": ("model.q_lora_rank=null",),
    "no mtp": ("model.num_nextn_predict_layers=0",),
    "mtp without weight": ("train.mtp_weight=0.0",),
    "dense stages": ("model.first_k_dense_replace=3",),
    "dense everywhere": ("model.first_k_dense_replace=4", "model.num_nextn_predict_layers=0"),
    "never clipped": ("optim.clip_norm=null",),
}


SHORT_CORNERS = ("no shared experts", "no mtp", "dense stages", "never clipped")


@pytest.mark.parametrize(
    "corner", [name if name in SHORT_CORNERS else pytest.param(name, marks=pytest.mark.long) for name in CORNERS]
)
def test_models_of_every_shape_train_alike_in_a_pipeline(pool: Pool, text: Path, corner: str) -> None:
    (expected,) = pool.run(train, 1, tiny(text, *DEEP, *AT_ONCE, *CORNERS[corner]), 1, 2)
    config = pipeline(text, "dualpipe", 2, *CORNERS[corner], "memory.recompute=full")
    ranks = pool.run(train, 2, config, 1, 2)
    for rank in ranks:
        for a, b in zip(expected.numbers, rank.numbers, strict=True):
            assert all(a[name] == b[name] or relative(a[name], b[name]) <= 1e-5 for name in a)
    found = {name: gradient for rank in ranks for name, gradient in rank.gradients.items()}
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize(
    "schedule",
    ["dualpipe", "zb1p", *(pytest.param(name, marks=pytest.mark.long) for name in ("dualpipev", "interleaved"))],
)
def test_fewer_micro_batches_than_the_pipeline_needs_change_nothing(pool: Pool, text: Path, schedule: str) -> None:
    """V3's batch ramp starts with 24 micro-batches for 16 ranks."""
    batch = "batch.global_sequences=3"
    layers = "model.num_hidden_layers=8"
    (expected,) = pool.run(train, 1, pipeline(text, "1f1b", 1, batch, layers), 1, 2)
    for rank in pool.run(train, 4, pipeline(text, schedule, 4, batch, layers), 1, 2):
        for a, b in zip(expected.numbers, rank.numbers, strict=True):
            assert all(relative(a[name], b[name]) <= 1e-5 for name in a)
        assert relative(rank.validation_loss, expected.validation_loss) <= 1e-5, "8 sequences, one of them alone"


def _half(worker: Worker, config: Config) -> Curve:
    """Two pipelines of two ranks in one world of four; the second trains on another seed."""
    first = worker.rank < 2
    ranks = [0, 1] if first else [2, 3]
    mine = config.model_copy(update={"run": config.run.model_copy(update={"seed": 2 if first else 3})})
    return run_steps(make_trainer(mine, 2, 1, ranks), 2, {})


@pytest.mark.long(claim="tests/training/test_grids.py::test_two_grids_in_one_world_do_not_touch_each_other")
def test_two_pipelines_in_one_world_do_not_touch_each_other(pool: Pool, text: Path) -> None:
    config = pipeline(text, "dualpipe", 2)
    together = pool.run(_half, 4, config)
    for seed, ranks in ((2, together[:2]), (3, together[2:])):
        expected = pool.run(train, 2, pipeline(text, "dualpipe", 2, f"run.seed={seed}"), 1, 2)
        for found, wanted in zip(ranks, expected, strict=True):
            assert found.numbers == wanted.numbers
            assert all(torch.equal(found.weights[name], tensor) for name, tensor in wanted.weights.items())


@pytest.mark.long(claim="tests/training/test_resume.py::test_in_another_layout_the_run_goes_on_within_rounding")
def test_a_checkpoint_of_any_pipeline_goes_on_in_any_other(pool: Pool, text: Path, tmp_path: Path) -> None:
    """Every key once, with a checksum; the next steps follow the unbroken run, bit by bit in the same layout."""
    layouts = [("1f1b", 1, 1), ("dualpipe", 2, 2)]
    configs = {"1f1b": tiny(text, *DEEP, *AT_ONCE), "dualpipe": pipeline(text, "dualpipe", 2)}
    unbroken, written = {}, {}
    for schedule, pp, ep in layouts:
        folder = tmp_path / f"{schedule}{pp}{ep}"
        unbroken[schedule] = pool.run(train, pp * ep, configs[schedule], ep, 3, {1: folder})
        written[schedule] = folder / "step-1"
    assert len({frozenset(read_manifest(path).tensors) for path in written.values()}) == 1
    for source, path in written.items():
        for schedule, pp, ep in layouts:
            ranks = pool.run(train, pp * ep, configs[schedule], ep, 3, None, path)
            for found, expected in zip(ranks, unbroken[schedule], strict=True):
                later = expected.numbers[1:]
                if source == schedule:
                    assert found.numbers == later
                    assert all(torch.equal(found.weights[name], t) for name, t in expected.weights.items())
                for a, b in zip(found.numbers, later, strict=True):
                    assert all(relative(a[name], b[name]) <= 1e-5 for name in a), (source, schedule)


def test_bf16_copies_of_a_stage_stay_bit_equal(pool: Pool, text: Path) -> None:
    config = pipeline(text, "dualpipe", 2, "precision.recipe=bf16", "optim.moments=bf16", "memory.recompute=v3")
    held = replicas(pool.run(train, 4, config, 2, 4))
    for name, copies in held.items():
        assert len(copies) == (2 if ".experts." in name else 4), name
        assert all(torch.equal(copies[0], copy) for copy in copies), name


@contextmanager
def spoilt(trainer: Trainer, module: str, rank: int, backward: bool, micro_batch: int) -> Iterator[None]:
    """Make one number of the module's output or gradient NaN on `rank` in its n-th micro-batch, while open."""
    calls = 0
    modules = dict(trainer.model.modules())
    per_step = 4

    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = float("nan")
        return tensor

    def hook(_module: Any, _given: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if (calls - 1) % per_step != micro_batch:
            return output
        if not backward:
            return spoil(output)
        output = output.clone()
        output.register_hook(spoil)
        return output

    here = trainer.groups.rank == rank and module in modules
    handle = modules[module].register_forward_hook(hook) if here else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _named(worker: Worker, config: Config, plants: list[tuple[str, int, bool, int]]) -> list[str]:
    trainer = make_trainer(config, worker.world_size, 1)
    said = []
    for plant in plants:
        with spoilt(trainer, *plant), pytest.raises(NonFiniteError) as caught:
            trainer.step()
        said.append(str(caught.value))
    trainer.step()
    trainer.close()
    return said


def _named_by_data(worker: Worker, config: Config, micro_batch: int) -> str:
    """Message after a token of one micro-batch becomes NaN where the first layer reads it."""
    trainer = make_trainer(config, worker.world_size, 1)
    batches, _ = trainer._next_batch()
    rare = 319  # no byte: it is in no text
    batches[micro_batch].tokens[0, 3] = rare
    trainer._next_batch = lambda: (batches, len(batches))  # type: ignore[method-assign]
    first = trainer.model.chunks[0]
    first.embedding.data[rare] = 0.0
    first.layers["0"].attention_norm.register_forward_pre_hook(_spoil_zeros)
    with pytest.raises(NonFiniteError) as caught:
        trainer.step()
    trainer.close()
    return str(caught.value)


def _spoil_zeros(_: Any, given: Any) -> Any:
    return (torch.where((given[0] == 0).all(-1, keepdim=True), float("nan"), given[0]), *given[1:])


@pytest.mark.parametrize(
    ("recompute", "micro_batch"),
    [
        ("none", 2),
        ("v3", 5),
        ("full", 2),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("none", 5), ("v3", 2), ("full", 5))),
    ],
)
def test_a_nan_that_comes_with_the_data_is_named_whatever_is_run_again(
    pool: Pool, text: Path, recompute: str, micro_batch: int
) -> None:
    config = pipeline(text, "dualpipe", 2, f"memory.recompute={recompute}")
    said, also = pool.run(_named_by_data, 2, config, micro_batch)
    assert said == also
    rank = int(micro_batch >= 4)  # the second half of the micro-batches enters at the other end
    assert f"rank {rank}, micro-batch {micro_batch}, forward, input of layers.0.attention_norm: 64 of 1024" in said


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.long), "zb1p", "dualpipe"])
def test_a_planted_nan_is_named_with_rank_micro_batch_and_tensor(pool: Pool, text: Path, schedule: str) -> None:
    """Rank 0 and 1 as pp 2; DualPipe runs micro-batches 0 to 3 from rank 0 and 4 to 7 from rank 1."""
    # With DualPipe each rank runs a stage for four micro-batches; with the others a rank runs its own for eight.
    plants = [("layers.3.mlp", 1, False, 2), ("layers.0.attention", 0, True, 1), ("mtp.1.block.attention", 1, True, 3)]
    if schedule != "dualpipe":
        plants = [(module, rank, backward, 0) for module, rank, backward, _ in plants]
    batch = "batch.global_sequences=8" if schedule == "dualpipe" else "batch.global_sequences=4"
    config = pipeline(text, schedule, 2, batch, "model.first_k_dense_replace=4", "parallel.split=[2,2]")
    (said, also) = pool.run(_named, 2, config, plants)
    assert said == also, "all ranks stop with the same words"
    for message, (module, rank, backward, number) in zip(said, plants, strict=True):
        direction = "backward, gradient of the" if backward else "forward,"
        assert message.startswith(
            f"step 1 is not finite: rank {rank}, micro-batch {number}, {direction} output of {module}: 1 of "
        ), message


class Failing:
    """Watch that calls `end` before the n-th action."""

    def __init__(self, fail: Callable[[object], None], after: int = 0) -> None:
        self.fail, self.after = fail, after

    def begin(self, action: object) -> None:
        if self.after == 0:
            self.fail(action)
        self.after -= 1

    def end(self, action: object) -> None:
        """Ignore the end."""

    def phase(self, side: str, name: str | None) -> None:
        """Ignore phases."""


def fail_in_steps(trainer: Trainer, failing: Failing) -> None:
    """Watch every further step with `failing`."""
    trainer.step = partial(trainer.step, watch=failing)  # type: ignore[method-assign]


def _failing(worker: Worker, config: Config, folder: Path) -> tuple[str, float]:
    """Each rank's error in the second step, in which rank 1 hangs, and the seconds until the error."""
    trainer = make_trainer(config, worker.world_size, 1)
    trainer.step()
    if worker.rank == 1:
        fail_in_steps(trainer, Failing(partial(_hang, folder)))
    started = time.monotonic()
    with pytest.raises(PipelineError) as caught:
        trainer.step()
    seconds = time.monotonic() - started
    (folder / f"ended-{worker.rank}").touch()
    return str(caught.value), seconds


def _hang(folder: Path, action: object) -> None:
    """Hang until both peers have ended."""
    deadline = time.monotonic() + 120
    while not all((folder / f"ended-{rank}").exists() for rank in (0, 2)):
        assert time.monotonic() < deadline, "the peers did not end"
        time.sleep(0.05)
    raise PipelineError(f"hung before {action}")


def _die(action: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WAITED = "of micro-batch 0 that stage 1 made from pipeline rank 1, to run"
FIRST = f"pipeline rank 0 waited for the gradient {WAITED} B0 of stage 0: "
LAST = f"pipeline rank 2 waited for the activation {WAITED} F0 of stage 2: "


def test_a_peer_that_hangs_ends_the_others_by_the_timeout_naming_whom_and_what_they_waited_for(
    pool: Pool, text: Path, tmp_path: Path
) -> None:
    config = pipeline(text, "1f1b", 3, "parallel.timeout=5")
    (first, first_after), (hung, _), (last, last_after) = pool.run(_failing, 3, config, tmp_path)
    assert hung == "hung before F0 of stage 1"
    assert first.startswith(FIRST) and last.startswith(LAST)
    assert min(first_after, last_after) > 4.5


def _step_twice(worker: Worker, config: Config, ep: int, after: int) -> None:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.step()
    if worker.rank == 1:
        fail_in_steps(trainer, Failing(_die, after))
    elif after == 0:
        time.sleep(1.0)  # so that the peer has ended before this rank waits for it
    trainer.step()


def test_a_peer_that_dies_ends_the_others_at_once_naming_whom_and_what_they_waited_for(pool: Pool, text: Path) -> None:
    config = pipeline(text, "1f1b", 3, "parallel.timeout=900")  # longer than the pool waits
    with pytest.raises(RankFailure) as caught:
        pool.run(_step_twice, 3, config, 1, 0)
    said = str(caught.value)
    assert "the process of rank 1 died" in said
    for rank in (0, 2):
        (line,) = [line for line in said.splitlines() if line.startswith(f"rank {rank} failed after it: ")]
        assert f"PipelineError: pipeline rank {rank} waited for" in line and "pipeline rank 1" in line, line


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.long), 4])
def test_a_peer_that_dies_among_expert_parallel_ranks_is_named_too(pool: Pool, text: Path, after: int) -> None:
    config = pipeline(text, "dualpipe", 2, "parallel.ep=2", "parallel.timeout=900")
    with pytest.raises(RankFailure) as caught:
        pool.run(_step_twice, 4, config, 2, after)
    said = str(caught.value)
    (peer,) = [line for line in said.splitlines() if line.startswith("rank 0 failed after it: ")]
    assert re.search(r"PipelineError: pipeline rank 0 in .*: the all-to-all of ranks 0, 1 failed: ", peer), peer
    for rank in (2, 3):
        (line,) = [line for line in said.splitlines() if line.startswith(f"rank {rank} failed after it: ")]
        assert "PipelineError: pipeline rank 1 " in line, line
