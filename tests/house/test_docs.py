"""Things that the documents name exist: commands, keys, fields, files and figures are those of the program."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from torch.distributed.run import get_args_parser

import counterflow
from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.schema import all_keys
from counterflow.configs.sections import MemoryConfig
from counterflow.configs.source import shipped
from counterflow.launcher import cli
from counterflow.launcher.commands import audit as audit_command
from counterflow.launcher.commands import config as config_command
from counterflow.launcher.commands import dryrun as dryrun_command
from counterflow.launcher.commands import placement as placement_command
from counterflow.launcher.commands import report as report_command
from counterflow.launcher.commands import simulate as simulate_command
from counterflow.launcher.commands import train as train_command
from counterflow.launcher.commands import verify as verify_command
from counterflow.launcher.failures import BAD_USAGE, FAILED
from counterflow.model.counts import count_parameters
from counterflow.parallel.layout import Layout
from counterflow.report.metrics import StepMetrics
from counterflow.report.summary import RunSummary
from counterflow.report.text.layout import draw_layout
from counterflow.report.text.numbers import format_count
from counterflow.tests.house.imports import MAY_IMPORT
from counterflow.tests.house.stated import arrows, rows_of

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?<![\w./-])counterflow [a-z].*")
KEYS = set(all_keys(Config))

Parse = Callable[[list[str]], argparse.Namespace]


@pytest.fixture(scope="session")
def pages(root: Path, project_files: list[Path]) -> dict[str, str]:
    """Every document by its path."""
    return {path.as_posix(): (root / path).read_text("utf-8") for path in project_files if path.suffix == ".md"}


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Return a function that parses words by the program's own command line, and stops before the command runs."""
    parsed: list[argparse.Namespace] = []

    def note(args: argparse.Namespace) -> int:
        parsed.append(args)
        return 0

    commands = audit_command, config_command, placement_command, report_command, simulate_command, train_command
    for module in (*commands, verify_command, dryrun_command):
        monkeypatch.setattr(module, "run", note)

    def words_to_meaning(words: list[str]) -> argparse.Namespace:
        assert cli.main(words) == 0, shlex.join(words)
        return parsed.pop()

    return words_to_meaning


def code_of(page: str) -> Iterator[str]:
    """Lines of a page's fenced blocks, without prompts, and its code in running text."""
    for _, block in FENCED.findall(page):
        joined = re.sub(r"\\\n *", "", block)  # a command that goes on below
        yield from (line.removeprefix("$ ") for line in joined.splitlines())
    yield from CODE.findall(FENCED.sub("", page))


def commands_of(page: str) -> Iterator[str]:
    """Everything after `counterflow` in the page's command lines, and what `make train ARGS=…` adds to its own."""
    for line in code_of(page):
        yield from (found.removeprefix("counterflow ") for found in COMMAND.findall(line))
        yield from (f"train smoke --nproc 4 {more}" for more in re.findall(r'make train ARGS="(.*?)"', line))


def test_what_simulate_prints_is_shown_as_it_is(pages: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = [block for _, block in FENCED.findall(pages["docs/pipeline.md"]) if block.count("\n") > 3]
    shown = [block for block in shown if block.startswith("$ counterflow simulate ")]
    assert len(shown) == 2
    for block in shown:
        command, _, output = block.partition("\n")
        assert cli.main(shlex.split(command)[2:]) == 0
        assert capsys.readouterr().out.startswith(output)


def is_synopsis(command: str) -> bool:
    return "[" in command.partition("=")[0]


def test_commands_parse_and_what_they_set_exists(pages: dict[str, str], parse: Parse) -> None:
    commands = [command for page in pages.values() for command in commands_of(page) if not is_synopsis(command)]
    assert len(commands) >= 10
    for words in (shlex.split(command, comments=True) for command in commands):
        assert words[0] in [command.name for command in cli.COMMANDS], words
        if len(words) == 1:  # a command's name in running text
            continue
        args = parse(words)
        if not hasattr(args, "config"):  # about an existing run
            continue
        assert {override.partition("=")[0] for override in args.overrides} <= KEYS, words
        if args.config in shipped():
            load_config(args.config, args.overrides)


def test_synopsis_names_every_option(pages: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (synopsis,) = [command for page in pages.values() for command in commands_of(page) if is_synopsis(command)]
    assert cli.main(["train", "--help"]) == 0
    options = set(re.findall(r"^  (?:-\w, )?(--\w+)", capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r"--\w+", synopsis)) == options - {"--help"}


def test_torchrun_commands_parse(pages: dict[str, str]) -> None:
    lines = [line for page in pages.values() for line in code_of(page) if line.startswith("torchrun ")]
    assert lines
    for line in lines:
        args = get_args_parser().parse_args(shlex.split(line)[1:])
        assert args.no_python and args.training_script == "counterflow", line


def test_benchmarks_have_the_options_that_are_shown(root: Path, pages: dict[str, str]) -> None:
    lines = [line.replace("make bench", "benchmarks/step.py") for page in pages.values() for line in code_of(page)]
    shown = [(found[0], line) for line in lines if (found := re.search(r"benchmarks/\w+\.py", line)) is not None]
    assert any("--rounds" in line for _, line in shown)
    for script, line in shown:
        source = (root / script).read_text("utf-8")
        for option in re.findall(r"--[\w-]+", line):
            assert f'add_argument("{option}"' in source, line


def test_keys_in_running_text_exist(pages: dict[str, str]) -> None:
    sections = "|".join(Config.model_fields)
    key = re.compile(rf"(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*(?=:|$)")
    current = [page for name, page in pages.items() if name != "CHANGELOG.md"]  # which names old keys too
    named = {found[0] for page in current for code in code_of(page) if (found := key.match(code)) is not None}
    assert {"memory.recompute", "parallel.dp", "log.tensorboard"} <= named
    assert named - {"config.yaml", "train.sbatch"} <= KEYS


def test_changelog_says_where_keys_moved(pages: dict[str, str]) -> None:
    rows = rows_of(pages["CHANGELOG.md"], "  | old key | new key |", skip=1)
    moved = {old.strip("`"): new.strip("`") for old, new in rows}
    assert len(moved) == 9
    assert set(moved.values()) <= KEYS
    assert not set(moved) & KEYS


def test_changelog_says_where_modules_moved(root: Path, pages: dict[str, str]) -> None:
    rows = rows_of(pages["CHANGELOG.md"], "  | old module | new module |", skip=1)
    assert len(rows) > 10
    for _, new in rows:
        folder = ""
        for path in re.findall(r"`([\w/*]+\.py)`", new):
            folder = path.rpartition("/")[0] or folder  # a bare name is in the folder of the one before it
            name = path.rpartition("/")[2]
            assert any((root / folder).glob(name)), f"{folder}/{name}"


def test_changelog_ends_with_the_version_that_this_is(pages: dict[str, str], root: Path) -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", pages["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == counterflow.__version__
    citation = yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == counterflow.__version__
    assert f"## {citation['version']} - {citation['date-released']}\n" in pages["CHANGELOG.md"]


def test_sections_shown_as_yaml_load(pages: dict[str, str]) -> None:
    for name in set(pages) - {"docs/configuration.md"}:  # which has tests of its own
        for language, block in FENCED.findall(pages[name]):
            if language == "yaml":
                for section, values in yaml.safe_load(block).items():
                    Config.model_fields[section].annotation.model_validate(values)


def test_metrics_are_listed_as_they_are_written(pages: dict[str, str]) -> None:
    rows = rows_of(pages["docs/training.md"], "## metrics.jsonl")
    assert [row[0].strip("`") for row in rows] == list(StepMetrics.model_fields)


def test_result_line_is_described_as_it_is_printed(pages: dict[str, str]) -> None:
    _, _, after = pages["docs/training.md"].partition("With `--json` standard output holds one line")
    assert CODE.findall(after)[: len(RunSummary.model_fields)] == list(RunSummary.model_fields)


def test_exit_codes_are_the_programs(pages: dict[str, str]) -> None:
    codes = [int(row[0]) for row in rows_of(pages["docs/training.md"], "## When something fails")]
    assert codes == [0, FAILED, BAD_USAGE, 130]


def test_recompute_policies_are_all_described(pages: dict[str, str]) -> None:
    (line,) = re.findall(r"^- `memory.recompute`: (.*?)^- ", pages["docs/training.md"], re.MULTILINE | re.DOTALL)
    assert tuple(CODE.findall(line)) == get_args(MemoryConfig.model_fields["recompute"].annotation)


def test_readme_lists_the_shipped_configs_with_their_sizes(pages: dict[str, str]) -> None:
    rows = rows_of(pages["README.md"], "## Next steps")
    listed = {name.strip("`"): (total, active) for name, total, active, _ in rows}
    counts = {name: count_parameters(load_config(name).model) for name in shipped()}
    assert listed == {name: (format_count(each.total), format_count(each.active)) for name, each in counts.items()}


def test_readme_shows_the_layout_that_is_drawn(pages: dict[str, str]) -> None:
    drawn = draw_layout(Layout(4, ep=load_config("smoke").parallel.ep, gpus_per_node=4))
    picture, _, _ = drawn.rpartition("\n\n")
    assert picture in pages["README.md"]


def test_pointers_into_the_code_lead_somewhere(root: Path, pages: dict[str, str]) -> None:
    pointers = re.findall(r"`([\w/]+\.py): ([\w.]+)`", pages["docs/architecture.md"])
    assert ("training/trainer.py", "Trainer.step") in pointers
    lost = [f"{path}: {name}" for path, name in pointers if not is_defined(root / path, name)]
    assert not lost, lost


def is_defined(path: Path, name: str) -> bool:
    """Whether the file at `path` has the class, function or method `name`, such as `Pool.run`."""
    body = ast.parse(path.read_text("utf-8")).body if path.is_file() else []
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        body = [inner for node in found for inner in getattr(node, "body", [])]
    return bool(body)


def test_every_folder_is_described_once(pages: dict[str, str], project_files: list[Path]) -> None:
    folders = {path.parts[0] for path in project_files if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    listed = [row[0].strip("`/") for row in rows_of(pages["docs/architecture.md"], "## Folders")]
    assert sorted(listed) == sorted(folders)


def test_contributing_states_the_arrows_that_are_held(pages: dict[str, str]) -> None:
    assert arrows(pages["CONTRIBUTING.md"]) == {folder: set(allowed) for folder, allowed in MAY_IMPORT.items()}


def test_picture_needs_nothing_from_elsewhere(root: Path, pages: dict[str, str]) -> None:
    (name,) = re.findall(r"!\[[^\]]+\]\((\S+\.svg)\)", pages["README.md"])
    source = (root / name).read_text("utf-8")
    picture = ElementTree.fromstring(source)
    links = [value for node in picture.iter() for key, value in node.items() if key.endswith("href")]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"@import|@font-face|url\((?!#)", source)
    assert source.count("http") == 1  # its own namespace


def test_picture_shows_the_smoke_run(root: Path) -> None:
    picture = ElementTree.parse(root / "docs" / "step.svg")
    texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text") if node.text]
    config = load_config("smoke")
    layout = Layout(4, ep=config.parallel.ep, gpus_per_node=4)
    sequences, experts = config.batch.global_sequences // layout.dp, config.model.n_routed_experts // layout.ep
    assert any(text.endswith(f", {config.batch.global_sequences} sequences") for text in texts)
    for rank in range(layout.world_size):
        place, first = layout.coordinates(rank), rank * sequences
        assert f"rank {rank}" in texts
        assert f"ep {place.ep}, edp {place.edp}" in texts
        assert f"{first}\N{EN DASH}{first + sequences - 1}" in texts
        assert f"{place.ep * experts}\N{EN DASH}{(place.ep + 1) * experts - 1}" in texts
