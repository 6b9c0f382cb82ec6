"""Moving average in a run: in checkpoints, in another layout, and in evaluations."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.checkpoint.manifest import read_manifest
from counterflow.configs.config import Config
from counterflow.launcher.cli import main
from counterflow.launcher.environment import PARENT_VARIABLE, RANK_VARIABLES
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import make_trainer, settings, tiny

AVERAGED = ("optim.ema_decay=0.8", "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0")
STEPS = 6  # of a whole run; the checkpoint is of step 3


def state_at_the_end(
    worker: Worker, config: Config, ep: int, resume: Path | None = None, save: Path | None = None
) -> dict[str, Tensor]:
    """Weights, moments and averages after step 6, of the tensors that this rank has a part in."""
    trainer = make_trainer(config, worker.world_size, ep)
    if resume is not None:
        trainer.restore(resume)
    while trainer.progress.step < STEPS:
        trainer.step()
        if save is not None and trainer.progress.step == STEPS // 2:
            trainer.save(save)
    trainer.close()
    whole = {**trainer.optimizer.state(), **trainer.optimizer.averages()}
    return {name: gathered(tensor) for name, tensor in whole.items()}


@pytest.fixture(scope="module")
def config(text: Path) -> Config:
    return tiny(text, *AVERAGED)


@pytest.fixture(scope="module")
def unbroken(
    pool: Pool, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Tensor]], Path]:
    """State of two ranks at the end of a run, and the checkpoint of its middle."""
    folder = tmp_path_factory.mktemp("averaged")
    return pool.run(state_at_the_end, 2, config, 2, None, folder), folder / f"step-{STEPS // 2}"


def test_a_resumed_run_has_the_average_of_the_unbroken_one_bit_for_bit(
    pool: Pool, config: Config, unbroken: tuple[list[dict[str, Tensor]], Path]
) -> None:
    ranks, checkpoint = unbroken
    assert read_manifest(checkpoint).progress["ema_updates"] == STEPS // 2
    for found, expected in zip(pool.run(state_at_the_end, 2, config, 2, checkpoint), ranks, strict=True):
        assert sum(name.startswith("ema.") for name in expected) > 20
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def _written_again(worker: Worker, config: Config, ep: int, path: Path, folder: Path) -> None:
    trainer = make_trainer(config, worker.world_size, ep)
    trainer.restore(path)
    trainer.save(folder)


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 2), (4, 4)])
def test_read_and_written_in_another_layout_the_average_has_the_same_bits(
    pool: Pool, config: Config, unbroken: tuple[Any, Path], tmp_path: Path, world: int, ep: int
) -> None:
    written = read_manifest(unbroken[1])
    pool.run(_written_again, world, config, ep, unbroken[1], tmp_path)
    again = read_manifest(tmp_path / unbroken[1].name)
    assert {n for n in written.tensors if n.startswith("ema.")} == {
        n.replace("exp_avg.", "ema.") for n in written.tensors if n.startswith("exp_avg.")
    }
    assert again.tensors == written.tensors, "names, shapes, formats and checksums"
    assert again.progress == written.progress


Restored = tuple[dict[str, Tensor], dict[str, Tensor], int | None, list[str]]


def _restored(worker: Worker, config: Config, path: Path) -> Restored:
    """Master weights and averages after loading, how many steps the average has seen, and the log messages."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    ours = logging.getLogger("counterflow")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    trainer = make_trainer(config, worker.world_size, 1)
    trainer.restore(path)
    ours.removeHandler(handler)
    state, averages, ema = trainer.optimizer.state(), trainer.optimizer.averages(), trainer.optimizer.ema
    weights = {n.removeprefix("weights."): gathered(t) for n, t in state.items() if n.startswith("weights.")}
    found = {n.removeprefix("ema."): gathered(t) for n, t in averages.items()}
    return weights, found, None if ema is None else ema.updates, said


def test_a_checkpoint_without_an_average_starts_one_from_its_weights_and_says_so(
    pool: Pool, text: Path, config: Config, tmp_path: Path
) -> None:
    without = tiny(text, *AVERAGED, "optim.ema_decay=null")
    pool.run(state_at_the_end, 1, without, 1, None, tmp_path)
    path = tmp_path / f"step-{STEPS // 2}"
    assert "ema_updates" not in read_manifest(path).progress
    weights, averages, updates, said = pool.run(_restored, 1, config, path)[0]
    assert updates == 1
    assert weights.keys() == averages.keys()
    assert all(torch.equal(weights[name], averages[name]) for name in weights)
    assert said == [f"WARNING: {path} has no average of the weights: it begins with the weights of this step"]


def test_an_average_that_is_not_configured_is_left_behind(
    pool: Pool, text: Path, unbroken: tuple[list[dict[str, Tensor]], Path]
) -> None:
    without = tiny(text, *AVERAGED, "optim.ema_decay=null")
    for weights, averages, updates, said in pool.run(_restored, 2, without, unbroken[1]):
        assert weights and (averages, updates) == ({}, None)
        assert said == [f"INFO: the average of the weights in {unbroken[1]} is left behind: optim.ema_decay is null"]


def _evaluations(worker: Worker, config: Config, ep: int) -> tuple[dict[str, float], float, float, bool]:
    """Losses of a trainer; loss of a second trainer whose weights are the average; the first one's loss afterwards."""
    first, second = (make_trainer(config, worker.world_size, ep) for _ in range(2))
    for _ in range(4):
        first.step()
        second.step()
    first.optimizer.finish_gathers()
    before = [item.parameter.detach().clone() for item in first.model.placed()]
    losses = first.validate()
    unmoved = all(map(torch.equal, before, [item.parameter for item in first.model.placed()]))
    averages, weights = first.optimizer.averages(), second.optimizer.state()
    for name, average in averages.items():
        weights[name.replace("ema.", "weights.")].to_local().copy_(average.to_local())
    second.optimizer.publish()
    first.close()
    second.close()
    return losses, second.evaluate(), first.evaluate(), unmoved


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2)])
def test_both_evaluations_are_of_the_weights_they_are_said_to_be(
    pool: Pool, config: Config, world: int, ep: int
) -> None:
    for losses, of_the_average, current, unmoved in pool.run(_evaluations, world, config, ep):
        assert losses == {"validation_loss": current, "validation_loss_ema": of_the_average}
        assert abs(current - of_the_average) > 1e-3
        assert unmoved


@pytest.mark.parametrize("evaluate", [True, False], ids=["evaluated", "not-evaluated"])
def test_a_run_records_the_loss_of_the_average(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], evaluate: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in (*RANK_VARIABLES, PARENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys = [*settings(text), *AVERAGED, "train.steps=4", "train.evaluate_every=2", "optim.moments=bf16"]
    keys += ["optim.beta2=0.999", f"train.evaluate_ema={str(evaluate).lower()}", "log.peak_tflops=0.1"]
    assert main(["train", "tiny", *(f"--set={key}" for key in keys), "--json"]) == 0
    printed = capsys.readouterr()
    steps = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [step["validation_loss_ema"] is not None for step in steps] == [False, evaluate, False, evaluate]
    assert json.loads(printed.out)["validation_loss_ema"] == steps[-1]["validation_loss_ema"]
    assert ("val EMA" in printed.err) == ("averaged weights" in printed.err) == evaluate
    assert "optim.beta2 0.999 with optim.moments bf16: second moments stop falling" in printed.err
    if evaluate:
        assert steps[-1]["validation_loss_ema"] != steps[-1]["validation_loss"]
