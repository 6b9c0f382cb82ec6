"""Command line: `counterflow`, its sub-commands and exit codes, and `counterflow config`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import counterflow
from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.source import shipped
from counterflow.launcher import cli
from counterflow.launcher.cli import COMMANDS, main
from counterflow.settings import Section


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, timeout=60)


def on_a_terminal(*arguments: str, columns: int = 80) -> str:
    """Output of the command on a terminal, with colours."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-P", "-m", "counterflow", *arguments]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment | {"TERM": "xterm-256color"})
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # on Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert process.wait() == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("form", [[], ["--explain"]], ids=["plain", "explained"])
def test_config_prints_yaml_that_loads_again(
    form: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "smoke", "--set", "train.steps=5", *form]) == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(str(path)) == load_config("smoke", ["train.steps=5"])


def test_config_prints_json_that_is_the_whole_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "deepseek-v3-671b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert Config.model_validate(printed) == load_config("deepseek-v3-671b")
    assert printed["optim"]["lr"][0] == {"tokens": 28.1e9, "start": 0.0, "end": 2.2e-4}


@pytest.mark.parametrize("name", shipped())
def test_explained_config_fits_eighty_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", name, "--explain"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_explained_config_has_the_help_unit_and_default_of_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "tiny", "--explain", "--set", "checkpoint.every=7", "--set", "model.rope_scaling.factor=2"])
    printed = capsys.readouterr().out
    words = " ".join(printed.replace("#", " ").split())

    def check(section: type[Section]) -> None:
        for field in section.model_fields.values():
            assert " ".join((field.description or "").split()) in words
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and section is Config:
                check(field.annotation)

    for name in Config.model_fields:
        check(type(getattr(load_config("tiny"), name)))
    assert re.search(r"^  every: 7 +# steps, default 1000$", printed, re.MULTILINE)
    assert re.search(r"^  compile: false +# default$", printed, re.MULTILINE)
    assert re.search(r"^    factor: 2\.0 +# default 40\.0$", printed, re.MULTILINE)
    assert re.search(r"^    # increment: .*$", printed, re.MULTILINE), "keys of a section that is off are shown too"


def test_terminal_gets_colours_around_the_same_text() -> None:
    shown = on_a_terminal("config", "tiny", "--explain")
    assert "\x1b[" in shown
    piped = run_process("-m", "counterflow", "config", "tiny", "--explain").stdout
    assert "\x1b[" not in piped
    assert without_colours(shown) == piped


def test_faults_go_to_stderr_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "tiny", "--set", "train.steps=x", "--set", "log.every=0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "counterflow: error: 2 faults in the configuration",
        "  --set log.every=0: log.every: must be at least 1, is 0",
        "  --set train.steps=x: train.steps: expects a whole number or null, got 'x'",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confg", "tiny"], "there is no command 'confg' (did you mean config?); commands: train, config"),
        (["config"], "the following arguments are required: CONFIG"),
        (["config", "tiny", "--explian"], "unrecognized arguments: --explian"),
        (["config", "tiny", "--json", "--explain"], "not allowed with argument"),
        (["config", "smok"], "no config is called 'smok' (did you mean smoke?)"),
        (["--verison"], "unrecognized arguments: --verison"),
        (["--", "config", "tiny"], "counterflow: error: "),
        ([], "usage: counterflow"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_help_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert all(command.name in capsys.readouterr().out for command in COMMANDS[:1])
    assert main(["config", "--help"]) == 0
    assert "--explain" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"counterflow {counterflow.__version__}\n"


def test_every_command_has_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command.name, "--help"]) == 0
        assert f"usage: counterflow {command.name} " in capsys.readouterr().out


def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main(["config", "tiny"]) == 130
    assert capsys.readouterr().err == "counterflow: interrupted\n"


def test_a_reader_that_stops_reading_gets_no_traceback() -> None:
    command = f"{sys.executable} -P -m counterflow config tiny --explain | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_help_and_config_do_without_torch() -> None:
    code = (
        "import sys; from counterflow.launcher.cli import main\n"
        "main(['--help']); main(['config', 'smoke', '--explain'])\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = run_process("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_module_and_console_script_are_the_same_program() -> None:
    done = run_process("-m", "counterflow", "config", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("counterflow: error: there is no file nowhere.yaml")
    assert "Traceback" not in done.stderr
