"""What a configuration becomes: files on bases, `--set` on files, defaults below it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.source import run_name, shipped
from counterflow.configs.write import explain, number, plain, to_yaml
from counterflow.settings import TokenSchedule, UsageError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file below the current folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return _write


def test_keys_left_out_have_their_defaults(write: Write) -> None:
    loaded = load_config(write("train: {steps: 7}"))
    assert loaded == Config(run={"name": "run"}, train={"steps": 7})


def test_base_is_merged_key_by_key_and_lists_are_replaced_whole(write: Write) -> None:
    write(
        "train: {steps: 9, evaluate_every: 3}\ndata: {source: folder, path: text, patterns: [a, b]}\n"
        "optim:\n  lr: [{tokens: 5, value: 1}, {value: 2}]\n  beta1: 0.5\n",
        "low.yaml",
    )
    write("base: low.yaml\noptim: {lr: 3}\n", "middle.yaml")
    top = write("base: ../middle.yaml\ntrain: {steps: 8}\ndata: {patterns: [c]}\n", "runs/top.yaml")
    config = load_config(top)
    assert (config.train.steps, config.train.evaluate_every) == (8, 3)
    assert config.data.patterns == ("c",)
    assert config.data.path == "text"
    assert config.optim.lr == TokenSchedule.model_validate(3.0)
    assert config.optim.beta1 == 0.5


def test_base_may_be_a_shipped_config(write: Write) -> None:
    config = load_config(write("base: tiny\ntrain: {steps: 3}\n"))
    tiny = load_config("tiny")
    assert config.model == tiny.model
    assert config.train == tiny.train.model_copy(update={"steps": 3})


def test_file_named_like_a_shipped_config_can_be_based_on_it(write: Write) -> None:
    assert load_config(write("base: tiny\ntrain: {steps: 3}\n", "tiny.yaml")).train.steps == 3


def test_null_turns_an_inherited_section_off_and_an_empty_one_changes_nothing(write: Write) -> None:
    write("batch: {ramp: {start: 3, tokens: 9, increment: 3}}\nlog: {every: 3}\ntrain: {steps: 1}\n", "low.yaml")
    config = load_config(write("base: low.yaml\nbatch:\n  ramp: null\nlog:\n  # every: 5\n"))
    assert config.batch.ramp is None
    assert config.log.every == 3


@pytest.mark.parametrize("name", ["./run.yaml", "sub/../run.yaml", "ABSOLUTE"])
def test_config_is_found_by_any_path(write: Write, name: str, tmp_path: Path) -> None:
    write("train: {steps: 7}")
    write("", "sub/other.yaml")
    assert load_config(str(tmp_path / "run.yaml") if name == "ABSOLUTE" else name).train.steps == 7


def test_file_without_suffix_is_found_unless_a_shipped_config_has_its_name(write: Write) -> None:
    write("train: {steps: 7}", "mine")
    write("train: {steps: 7}", "tiny")
    assert load_config("mine").train.steps == 7
    assert load_config("tiny").train.steps == 20


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optim.lr=1e-4", lambda c: c.optim.lr.at(0), 1e-4),
        (
            "optim.lr=[{tokens: 10, start: 0, end: 1}, {value: 3}]",
            lambda c: (c.optim.lr.at(5), c.optim.lr.at(11)),
            (0.5, 3),
        ),
        ("train.tokens=28.1e9", lambda c: c.train.tokens, 28_100_000_000),
        ("train.steps=1e3", lambda c: c.train.steps, 1000),
        ("batch.global_sequences=15_360", lambda c: c.batch.global_sequences, 15360),
        ("parallel.dp=auto", lambda c: c.parallel.dp, "auto"),
        ("parallel.dp=4", lambda c: c.parallel.dp, 4),
        ("optim.clip_norm=null", lambda c: c.optim.clip_norm, None),
        ("optim={beta1: 0.5, eps: 1e-6}", lambda c: (c.optim.beta1, c.optim.eps, c.optim.beta2), (0.5, 1e-6, 0.95)),
        ('data.patterns=["*.c", x]', lambda c: c.data.patterns, ("*.c", "x")),
        ("model.rope_scaling.factor=2", lambda c: c.model.rope_scaling.factor, 2),
        ("run.name=2026", lambda c: c.run.name, "2026"),
        ("run.name=2026-01-31", lambda c: c.run.name, "2026-01-31"),
        ("run.dir=a=b", lambda c: c.run.dir, "a=b"),
        ("run.dir=1.50", lambda c: c.run.dir, "1.50"),
    ],
)
def test_set_parses_its_value_as_yaml(override: str, read: Callable[[Config], Any], value: object) -> None:
    assert read(load_config("tiny", [override])) == value


def test_later_set_wins_over_earlier_and_over_the_file() -> None:
    config = load_config("tiny", ["train.steps=5", "train={evaluate_every: 3}", "train.steps=6"])
    assert (config.train.steps, config.train.evaluate_every) == (6, 3)


def test_run_is_named_after_its_config_unless_it_has_a_name(write: Write) -> None:
    assert load_config("tiny").run.name == "tiny"
    assert load_config(write("base: tiny", "a b.v2.yaml")).run.name == "a-b.v2"
    assert load_config("a b.v2.yaml", ["run.seed=3"]).run.name == "a-b.v2"
    assert load_config("a b.v2.yaml", ["run.name=other"]).run.name == "other"
    write("run: {name: given}\ntrain: {steps: 1}", "named.yaml")
    assert load_config(write("base: named.yaml", "top.yaml")).run.name == "given"


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_every_file_name_gives_a_run_name_that_is_accepted(stem: str) -> None:
    assert Config(run={"name": run_name(stem)}, train={"steps": 1}).run.name == run_name(stem)


@pytest.mark.parametrize("base", ["a.yaml", "./a.yaml", "../{here}/a.yaml"])
def test_circle_of_bases_is_an_error_that_names_the_chain(write: Write, tmp_path: Path, base: str) -> None:
    write("base: b.yaml", "a.yaml")
    write("train: {steps: 1}\nbase: c.yaml", "b.yaml")
    write("base: " + base.format(here=tmp_path.name), "c.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config("a.yaml")
    (fault,) = caught.value.faults
    assert str(fault) == "c.yaml:1: base: makes a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml"


def test_missing_base_is_an_error_at_its_line(write: Write) -> None:
    write("train: {steps: 1}\nbase: tinny\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert str(caught.value.faults[0]).startswith("run.yaml:2: base: no config is called 'tinny' (did you mean tiny?)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smok", "no config is called 'smok' (did you mean smoke?); shipped: audit, deepseek-v3-16b,"),
        ("deepseek-v3", "no config is called 'deepseek-v3' (did you mean deepseek-v3-"),
        ("nothing-like-it", "no config is called 'nothing-like-it'; shipped:"),
        ("smoke.yaml", "there is no file smoke.yaml (did you mean smoke?)"),
        ("folder", "folder is a folder, not a config"),
    ],
)
def test_unknown_config_lists_the_shipped_ones(write: Write, name: str, message: str) -> None:
    write("", "folder/x.yaml")
    with pytest.raises(UsageError) as caught:
        load_config(name)
    assert str(caught.value).startswith(message)
    assert all(config in str(caught.value) for config in shipped())


def test_file_that_is_not_text_is_a_usage_error(write: Write, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match="not a text file in UTF-8"):
        load_config("run.yaml")


PHASES = st.lists(
    st.one_of(
        st.builds(lambda t, v: {"tokens": t, "value": v}, st.floats(1, 1e15), st.floats(0, 1e3)),
        st.builds(
            lambda t, a, b, shape: {"tokens": t, "start": a, "end": b, "shape": shape},
            st.floats(1e-3, 1e15),
            st.floats(0, 10),
            st.floats(0, 10),
            st.sampled_from(["linear", "cosine"]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    lr=st.one_of(st.floats(0, allow_infinity=False), PHASES),
    eps=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**70),
    folder=st.text().filter(lambda text: all(c.isprintable() or c in "\n\t\x00\x85\u2028" for c in text)),
    patterns=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=30),
    clip=st.none() | st.floats(1e-9, 1e9),
)
def test_printed_yaml_loads_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory,
    lr: object,
    eps: float,
    seed: int,
    folder: str,
    patterns: list[str],
    clip: float | None,
) -> None:
    config = Config(
        run={"seed": seed, "dir": folder},
        optim={"lr": lr, "eps": eps, "clip_norm": clip},
        data={"source": "folder", "path": "-", "patterns": tuple(patterns)},
        train={"steps": 1},
    )
    path = tmp_path_factory.mktemp("round") / "trip.yaml"
    for text in (to_yaml(config), explain(config)):
        path.write_text(text, encoding="utf-8")
        assert load_config(str(path)) == config


@pytest.mark.parametrize(
    "text", ["yes", "off", "null", "2026-01-31", "012", "1e5", "- a", "a: b", "#", "", " a", "~", "é"]
)
def test_printed_text_is_text_to_every_yaml_reader(text: str) -> None:
    printed = to_yaml(load_config("tiny", [f"run.dir={text!r}"]))
    assert yaml.safe_load(printed)["run"]["dir"] == text


@settings(max_examples=60, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_printed_numbers_mean_the_same_to_yaml_1_1_readers(value: float) -> None:
    assert yaml.safe_load(number(value)) == value
    assert isinstance(yaml.safe_load(number(value)), float)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (28.1e9, "28.1e+9"), (14.8e12, "14.8e+12"), (2.2e-4, "2.2e-4"), (1e-8, "1.0e-8"), (0.95, "0.95"),
        (10000.0, "10000.0"), (1e6, "1.0e+6"), (163840.0, "163840.0"), (0.0, "0.0"), (-1e9, "-1.0e+9"),
    ],
)  # fmt: skip
def test_numbers_are_printed_as_a_person_writes_them(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_print_and_load_again(write: Write, name: str) -> None:
    config = load_config(name)
    for text in (to_yaml(config), explain(config)):
        assert load_config(write(text, f"{name}.yaml")) == config


def test_schedules_print_in_their_short_form() -> None:
    overrides = ["optim.lr=2", "train.mtp_weight=[{tokens: 5, value: 1}]", "balance.bias_update_speed=[{value: 1}]"]
    short = plain(load_config("tiny", overrides))
    assert short["optim"]["lr"] == 2.0
    assert short["train"]["mtp_weight"] == [{"tokens": 5.0, "value": 1.0}]
    assert short["balance"]["bias_update_speed"] == 1.0
