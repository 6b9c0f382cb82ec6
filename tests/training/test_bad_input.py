"""Refusal of settings that cannot work, before anything is started or written: one message, exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from counterflow.launcher.cli import main
from counterflow.launcher.environment import PARENT_VARIABLE, RANK_VARIABLES
from counterflow.tests.training.harness import Runs, settings


@pytest.fixture
def refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `counterflow train tiny`, check that it is refused and writes nothing, and return its message."""
    monkeypatch.chdir(tmp_path)
    for name in (*RANK_VARIABLES, PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)

    def train(*overrides: str, nproc: int = 1, config: str = "tiny", keep: bool = True) -> str:
        before = contents(tmp_path)
        sets = [part for each in (*(settings(text) if keep else ()), *overrides) for part in ("--set", each)]
        assert main(["train", config, "--nproc", str(nproc), *sets]) == 2
        console = capfd.readouterr()
        assert console.out == ""
        assert contents(tmp_path) == before, "nothing is written"
        heading, _, message = console.err.removesuffix("\n").partition("error: ")
        assert heading == "counterflow: "
        assert "Traceback" not in message
        return message

    return train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "nproc", "message"),
    [
        (["parallel.ep=3"], 1, "  --set parallel.ep=3: parallel.ep: 3 does not divide model.n_routed_experts 8 "),
        (["parallel.ep=2"], 3, "3 ranks cannot be laid out as pp 1 x ep 2: the number of ranks must be a multiple of"),
        (["parallel.ep=2"], 1, "nearest that work: 2 ranks, or parallel.ep 1 (--nproc N starts N ranks)"),
        (["parallel.dp=8"], 2, "parallel.pp 1 x parallel.dp 8 needs 8 ranks, but there are 2: start 8 ranks, or set "),
        (["parallel.dp=2"], 1, "needs 2 ranks, but there is 1: start 2 ranks, or set parallel.dp to auto (--nproc N"),
        (["parallel.dp=6", "parallel.ep=4"], 6, "parallel.dp: 6 is not a positive multiple of parallel.ep 4 (nearest:"),
        (
            ["parallel.pp=3"],
            3,
            "parallel.pp: 3 makes 6 stages in schedule dualpipev, but model.num_hidden_layers is 3 ",
        ),
        (
            ["parallel.pp=2"],
            3,
            "3 ranks cannot be laid out as pp 2 x ep 1: the number of ranks must be a multiple of 2",
        ),
        (
            [],
            3,
            "batch.global_sequences 8 is not a multiple of 3 (dp 3 x batch.micro_sequences 1); nearest that work: ",
        ),
        (["batch.micro_sequences=3"], 2, "batch.global_sequences 8 is not a multiple of 6 (dp 2 x batch.micro_sequenc"),
        (
            ["batch.ramp={start: 4, tokens: 1e6, increment: 1}"],
            4,
            "batch.ramp.increment 1 is not a multiple of 4 (dp 4 x batch.micro_sequences 1); nearest that work: 4",
        ),
        (["model.vocab_size=200"], 1, "model.vocab_size is 200, but data.tokenizer bytes has 257 tokens"),
        (["data.path=nowhere"], 1, "nowhere does not exist; it should be a folder of text files"),
        (["train.stepz=3"], 1, "  --set train.stepz=3: train.stepz: unknown key (did you mean train.steps?)"),
        (["train.steps=many"], 1, "  --set train.steps=many: train.steps: expects a whole number or null, got 'many'"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_numbers(
    refused: Refused, overrides: list[str], nproc: int, message: str
) -> None:
    assert message in refused(*overrides, nproc=nproc)


def test_everything_that_is_wrong_is_said_at_once(refused: Refused) -> None:
    said = refused("model.vocab_size=200", "data.path=nowhere", "parallel.dp=8", nproc=2).splitlines()
    assert said[0] == "this run cannot start:"
    assert [line.split()[0] for line in said[1:]] == ["parallel.pp", "model.vocab_size", "data.path"]
    assert all(line.startswith("  ") for line in said[1:])


def test_a_config_that_is_not_there_is_answered_with_those_that_are(refused: Refused) -> None:
    assert "no config is called 'tinny' (did you mean tiny?); shipped: " in refused(config="tinny")
    assert "there is no file elsewhere/x.yaml; shipped: " in refused(config="elsewhere/x.yaml")


def test_text_too_short_for_one_sample_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "short" / name).write_text("short")
    cache = tmp_path.parent / "cache"
    said = refused(f"data.path={tmp_path / 'short'}", f"data.cache_dir={cache}")
    assert "text has 6 tokens, fewer than the 18 of one sample" in said


def test_a_run_folder_that_cannot_be_made_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused("run.dir=file") == f"run.dir cannot hold this run: {tmp_path / 'file'} is a file"
    assert refused("run.dir=file/below") == f"run.dir cannot hold this run: {tmp_path / 'file'} is a file"


@pytest.fixture
def checkpoint(runs: Runs, tmp_path: Path) -> Path:
    """Run folder with a checkpoint of step 10 that four ranks wrote."""
    return Path(shutil.copytree(runs.checkpoint(4, 2), tmp_path / "runs" / "tiny" / "checkpoints" / "step-10"))


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(refused: Refused, checkpoint: Path) -> None:
    said = refused("model.hidden_size=32", "model.q_lora_rank=null")
    assert said.splitlines() == [
        "checkpoint runs/tiny/checkpoints/step-10 is of another model:",
        "  model.hidden_size: 64 in the checkpoint, 32 in the config",
        "  model.q_lora_rank: 32 in the checkpoint, null in the config",
        "use the config it was written with, or another run.name",
    ]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__1_0.distcp"])
def test_a_torn_checkpoint_is_refused_with_what_to_do(
    refused: Refused, checkpoint: Path, name: str, damage: str
) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if damage == "truncated":
        (checkpoint / name).write_bytes(content[: len(content) // 2])
    said = refused(nproc=2)
    assert said.startswith("checkpoint runs/tiny/checkpoints/step-10 is torn: ")
    assert name in said
    assert said.endswith("; delete runs/tiny/checkpoints/step-10 to start again")


def test_a_damaged_checkpoint_ends_a_launch_with_the_same_clear_words(text: Path, checkpoint: Path) -> None:
    """Real processes: the ranks find the damage, and the calling process reports it once."""
    run = checkpoint.parent.parent
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 4, len(content), len(content) // 4):
        content[place] ^= 1
    file.write_bytes(content)
    before = contents(run)
    command = [sys.executable, "-P", "-m", "counterflow", "train", "tiny", "--nproc", "2", "--json"]
    sets = [part for each in (*settings(text), f"run.dir={run.parent}") for part in ("--set", each)]
    done = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"counterflow: error: checkpoint {checkpoint} is ")
    assert error.endswith(f"; delete {checkpoint} to start again")
    assert "Traceback" not in done.stdout + done.stderr
    assert not any(line.startswith("{") for line in done.stdout.splitlines())
    after = contents(run)
    new = {str(Path(path).relative_to(run)).split("/")[0] for path in after if path not in before}
    assert new <= {"config.yaml", "logs"}
    assert {path: after[path] for path in before} == before


def test_starting_afresh_leaves_the_old_run_alone_if_the_ranks_cannot_start(text: Path, checkpoint: Path) -> None:
    """The ranks look for a GPU; the folder is moved aside once all of them have started."""
    run = checkpoint.parent.parent
    before = contents(run.parent)
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "counterflow", "train", "tiny", "--nproc", "2", "--fresh"]
    sets = [part for each in (*settings(text), f"run.dir={run.parent}", "run.device=cuda") for part in ("--set", each)]
    done = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=120, env=no_gpu)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("counterflow: error: run.device is cuda, but torch finds no GPU")
    assert contents(run.parent) == before
