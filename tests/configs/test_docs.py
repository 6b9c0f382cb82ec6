"""Guide to configuration: its files load, and its commands print the output shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import counterflow
from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.schema import all_keys
from counterflow.configs.source import shipped
from counterflow.launcher.cli import main

GUIDE = (Path(counterflow.__file__).parent / "docs" / "configuration.md").read_text(encoding="utf-8")
FILES = {
    match.group(1): match.group()[8:-4]
    for match in re.finditer(r"^```yaml\n# (\S+)\n.*?^```$", GUIDE, re.MULTILINE | re.DOTALL)
}
COMMANDS = [
    (match.group(1), match.group(2))
    for block in re.findall(r"^```console\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"^\$ counterflow (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE)
]


@pytest.fixture(autouse=True)
def folder_of_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files of the guide, and the Hugging Face config that it names."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("checkpoint").mkdir()
    Path("checkpoint/config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))


def test_every_yaml_of_the_guide_is_a_file_with_a_name() -> None:
    assert set(FILES) == {"wide.yaml", "wrong.yaml", "phases.yaml", "continued.yaml"}
    assert GUIDE.count("```yaml") == len(FILES)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"wrong.yaml"}))
def test_files_of_the_guide_load(name: str) -> None:
    config = load_config(name)
    assert config.run.name == name.removesuffix(".yaml")


def test_values_of_the_guide_arrive() -> None:
    assert (load_config("wide.yaml").model.hidden_size, load_config("wide.yaml").train.steps) == (192, 600)
    assert (load_config("continued.yaml").model.num_hidden_layers, load_config("continued.yaml").model.vocab_size) == (
        4,
        129280,
    )
    phases = load_config("phases.yaml")
    assert [phases.optim.lr.at(tokens) for tokens in (0.5e6, 5e6, 9.5e6, 11e6)] == pytest.approx(
        [1.5e-4, 3e-4, 1.65e-4, 3e-5]
    )
    assert sorted({phases.batch.sequences_at(tokens) for tokens in range(0, 2_000_001, 1000)}) == list(range(16, 65, 8))


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_commands_of_the_guide_do_what_it_shows(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(shlex.split(command))
    printed = capsys.readouterr()
    if shown:
        assert (code, printed.err) == (2, shown)
    else:
        assert (code, printed.err) == (0, "")
        assert printed.out


def test_guide_lists_the_shipped_configs() -> None:
    assert re.findall(r"^\| `(\S+)` \|", GUIDE, re.MULTILINE) == [
        "smoke",
        "tiny",
        "audit",
        "deepseek-v3-16b",
        "deepseek-v3-671b",
    ]
    assert set(shipped()) == set(re.findall(r"^\| `(\S+)` \|", GUIDE, re.MULTILINE))


def test_keys_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"`([a-z]+\.[a-z_.]+)`", GUIDE)) - {"config.yaml", "config.json"}
    assert {"optim.lr", "train.mtp_weight", "run.name"} <= named
    assert named <= set(all_keys(Config))
