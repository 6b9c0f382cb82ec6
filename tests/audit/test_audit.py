"""`counterflow audit`: both runs, the report, and the class of tensors that the report names as the worst.

The model is 0.7M parameters of V3's shape, so that 60 steps of both runs take seconds. The bound for the losses is
looser than V3's 0.25 %, which `make audit` holds over 1,000 steps: after so few steps the two runs differ by a percent.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from counterflow.audit.attribution import attribute
from counterflow.audit.case import AuditCase, make_case
from counterflow.audit.probe import Gradients, Point, Probe, compare, moved_share
from counterflow.audit.result import Attribution, AuditStep, Look, Result, mean_loss, most_hurt
from counterflow.audit.run import Audit, audit_of
from counterflow.configs.load import load_config
from counterflow.fp8.statistics import Statistics
from counterflow.fp8.tensor_formats import KINDS
from counterflow.launcher import cli
from counterflow.launcher.bootstrap import bootstrap
from counterflow.launcher.environment import WorkerEnvironment, cache_folder
from counterflow.parallel.layout import Layout
from counterflow.training.build import make_groups
from counterflow.training.parameter_classes import parameter_class
from counterflow.training.trainer import Trainer

CACHE = cache_folder(os.environ)
"""Folder for tokenised text, the same as that of the command."""
STEPS = 60
BOUND = 0.02
"""Relative error of the mean loss of the last tenth of 60 steps."""

CONFIG = """
model:
  vocab_size: 320
  hidden_size: 128
  intermediate_size: 128
  moe_intermediate_size: 64
  num_hidden_layers: 2
  first_k_dense_replace: 1
  num_attention_heads: 2
  q_lora_rank: 64
  kv_lora_rank: 64
  qk_nope_head_dim: 32
  qk_rope_head_dim: 16
  v_head_dim: 32
  n_routed_experts: 4
  n_shared_experts: 1
  num_experts_per_tok: 2
  n_group: 2
  topk_group: 1
  num_nextn_predict_layers: 1
  max_position_embeddings: 64
  initializer_range: 0.02
batch: {sequence_length: 64, global_sequences: 4, micro_sequences: 4}
optim:
  lr:
    - {tokens: 2560, start: 0.0, end: 2e-3}
    - {tokens: 15360, start: 2e-3, end: 5e-4, shape: cosine}
precision: {recipe: fp8}
data: {source: builtin}
train: {steps: 60, evaluate_sequences: 8}
memory: {recompute: v3}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(CONFIG)
    return path


FEW = """precision.classes={"*": {format: high}, "experts_down.*": {format: e4m3}, "attention.*": {format: e4m3}}"""
"""The classes of two kinds alone, so that each can be tried in turn in seconds."""


@pytest.fixture(scope="module")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both runs over 60 steps, with all classes quantised: their records, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "records"
    with audit(small, folder, steps=STEPS) as made:
        assert made.run(ignore) is None
        return {
            "steps": made.steps,
            "looks": made.looks,
            "entropy": made.case.plan.data.unigram_entropy,
            "at": folder,
        }


@pytest.fixture(scope="module")
def audited(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result that the command prints with --json for a few steps and classes, its page, and its folder."""
    folder = tmp_path_factory.mktemp("audited")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        page = folder / "page.html"
        command = ["audit", str(small), "--json", "--html", str(page), "--out", str(folder / "records")]
        code = cli.main([*command, "--steps", "10", "--every", "5", "--set", FEW])
    assert code == 0, err.getvalue()
    return {"result": json.loads(out.getvalue()), "page": page.read_text(), "folder": folder / "records"}


@contextlib.contextmanager
def audit(small: Path, folder: Path, *overrides: str, steps: int = 4) -> Iterator[Audit]:
    case = make_case(load_config(str(small), overrides), steps, steps, "bf16", folder, CACHE)
    folder.mkdir(exist_ok=True)
    with bootstrap(WorkerEnvironment(), "cpu") as process, audit_of(case, process.device) as made:
        yield made


@contextlib.contextmanager
def opened(trained: dict[str, Any], small: Path) -> Iterator[Audit]:
    """The two runs after their 60 steps."""
    with audit(small, trained["at"], steps=STEPS) as made:
        assert made.resume() == STEPS
        yield made


def ignore(*_: Any) -> None:
    pass


def test_losses_stay_together_over_60_steps_and_fall_below_the_unigram_entropy(trained: dict[str, Any]) -> None:
    last: list[AuditStep] = trained["steps"][-STEPS // 10 :]
    loss = mean_loss(last)
    fp8, bf16 = (sum(losses) / len(last) for losses in zip(*((s.fp8.loss, s.other.loss) for s in last), strict=True))
    assert loss.error == pytest.approx((fp8 - bf16) / bf16)
    print(f"error {100 * loss.error:+.3f} %, bound {100 * BOUND} %")
    assert len(trained["steps"]) == STEPS and 0 < abs(loss.error) < BOUND
    assert fp8 < trained["entropy"] and bf16 < trained["entropy"]


def test_each_run_is_the_one_that_train_makes(trained: dict[str, Any], small: Path) -> None:
    """Runs on two threads at a time equal runs on one, bit for bit."""
    with bootstrap(WorkerEnvironment(), "cpu") as process:
        for recipe in ("fp8", "bf16"):
            case = make_case(load_config(str(small)), None, None, "bf16", None, CACHE)
            config = case.config if recipe == "fp8" else case.plain("bf16")
            trainer = Trainer(config, make_groups(config, Layout(1), "cpu"), process.device, case.plan.data)
            losses = [trainer.step().loss for _ in range(3)]
            trainer.close()
            assert losses == [getattr(step, recipe).loss for step in trained["steps"][:3]]


def test_gradients_are_those_of_the_next_step(small: Path, tmp_path: Path) -> None:
    with audit(small, tmp_path / "a", "batch.micro_sequences=2", steps=2) as made:
        made.run(ignore)
        trainer = made.trainers["fp8"]
        point = Point.of(trainer)
        probe = Probe(made.case.config, made.groups, made.device)
        found, observed = probe.gradients(point), probe.gradients(point, Statistics())
        trainer.step()
        expected = {name: tensor.to_local() for name, tensor in trainer.optimizer.reduced_gradients().items()}
    assert found.tensors.keys() == expected.keys()
    for name, gradient in found.tensors.items():
        assert torch.equal(gradient, expected[name].view_as(gradient)), name
        assert torch.equal(gradient, observed.tensors[name]), name  # an observer changes nothing


def test_an_audit_that_was_stopped_goes_on_as_if_it_had_not_been(small: Path, tmp_path: Path) -> None:
    with audit(small, tmp_path / "whole", steps=6) as whole:
        whole.run(ignore)
    with audit(small, tmp_path / "parts", "checkpoint.every=3", steps=3) as first:
        first.run(ignore)
    with (tmp_path / "parts" / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "fp8')  # it was killed here
    with audit(small, tmp_path / "parts", "checkpoint.every=3", steps=6) as rest:
        assert rest.resume() == 3
        rest.run(ignore)
    assert rest.steps == whole.steps
    assert rest.looks[-1] == whole.looks[-1]
    written = [json.loads(line) for line in (tmp_path / "parts" / "steps.jsonl").read_text().splitlines()]
    assert written == [step.model_dump() for step in whole.steps]
    assert list(written[0]) == ["step", "fp8", "bf16"] and list(written[0]["fp8"]) == ["loss", "loss_mtp", "grad_norm"]


def test_difference_is_the_relative_norm_and_the_cosine() -> None:
    own = {"head": torch.tensor([[3.0, 4.0]]), "layers.0.mlp.w2": torch.tensor([[1.0]])}
    exact = {"head": torch.tensor([[3.0, 3.0]]), "layers.0.mlp.w2": torch.tensor([[-1.0]])}
    found = compare(Gradients(own, {}), Gradients(exact, {}))
    assert list(found) == ["head", "dense_down", "all"]
    assert found["head"].error == pytest.approx(1 / 18**0.5)
    assert found["head"].cosine == pytest.approx(21 / (5 * 18**0.5))
    assert found["dense_down"].cosine == -1 and found["dense_down"].error == 2
    assert found["all"].error == pytest.approx((1 + 4) ** 0.5 / 19**0.5)


def test_moved_share_counts_choices_whatever_their_order() -> None:
    before, after = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 0]])
    assert moved_share({0: [after]}, {0: [before]}) == 0.25


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.3.attention.kv_norm", "norms"),
        ("norm", "norms"),
        ("layers.3.attention.kv_up", "attention"),
        ("layers.3.attention.out", "attention_out"),
        ("layers.3.mlp.experts.7.w3", "experts_up"),
        ("mtp.0.block.mlp.shared.w2", "shared_down"),
        ("layers.0.mlp.w1", "dense_up"),
        ("mtp.0.project", "mtp"),
        ("layers.3.mlp.gate", "router"),
    ],
)
def test_parameters_have_classes(name: str, expected: str) -> None:
    assert parameter_class(name) == expected


def test_a_look_compares_with_fp32(trained: dict[str, Any]) -> None:
    look: Look
    (look,) = trained["looks"]
    assert look.step == STEPS
    assert 0 < look.gradients.bf16["all"].error < look.gradients.fp8["all"].error < 0.2
    assert 0 < look.moved.bf16 < look.moved.fp8 < 0.1
    assert {name.partition(".")[2] for name in look.classes} == {"input", "weight", "gradient", "cache"}


def test_attribution_adds_up(audited: dict[str, Any]) -> None:
    """Squared errors of the roles add up to about that of all, because roundings are independent of each other."""
    found = audited["result"]["attribution"]
    roles = [found["entries"][f"*.{role}"]["alone"]["all"] for role in ("input", "weight", "gradient", "cache")]
    assert sum(error**2 for error in roles) ** 0.5 == pytest.approx(found["together"]["all"], rel=0.3)
    for name, entry in found["entries"].items():
        assert entry["alone"]["all"] < 1.2 * found["together"]["all"], name
    # All but one kind is the other kind.
    assert found["entries"]["attention.*"]["without"] == found["entries"]["experts_down.*"]["alone"]


def test_attribution_names_the_class_that_was_made_bad(trained: dict[str, Any], small: Path) -> None:
    """The second-worst class of inputs becomes the worst in E5M2, which rounds twice as coarsely as E4M3.

    Only inputs of feed-forward layers take part: inputs of attention spread further in any format.
    """
    inputs = frozenset(f"{kind}.input" for kind in KINDS if kind.endswith(("_up", "_down")))
    with opened(trained, small) as made:

        def measured(*override: str) -> Attribution:
            made.case = make_case(load_config(str(small), override), None, None, "bf16", None, CACHE)
            return attribute(made, Point.of(made.trainers["fp8"]), inputs, ignore)

        usual = measured()
        order = [name for name, _ in usual.worst_first()]
        made_bad = order[1]
        found = measured(f'precision.classes={{"{made_bad}": {{format: e5m2}}}}')
    assert set(order) == inputs
    assert next(iter(found.worst_first()))[0] == made_bad
    before, after = (most_hurt(each.entries[made_bad].alone) for each in (usual, found))
    assert before[0] == after[0]
    assert after[1] == pytest.approx(2 * before[1], rel=0.2)


def test_with_the_same_routing_bf16_is_nearer_to_fp32_than_fp8_in_every_class(
    trained: dict[str, Any], small: Path
) -> None:
    with opened(trained, small) as made:
        point, case = Point.of(made.trainers["fp8"]), made.case
        exact = Probe(case.plain("fp32"), made.groups, made.device).gradients(point)
        fp8, bf16 = (
            Probe(config, made.groups, made.device).gradients(point, choices=exact.choices)
            for config in (case.config, case.plain("bf16"))
        )
        assert moved_share(fp8.choices, exact.choices) == 0
    floor = compare(bf16, exact)
    for name, difference in compare(fp8, exact).items():
        assert 0 < 2 * floor[name].error < difference.error < 0.2, name
        assert floor[name].cosine > difference.cosine > 0.98, name


def test_square_tiles_for_gradients_are_worse(trained: dict[str, Any], small: Path) -> None:
    """V3's negative result (appendix B.2) on the weights after 60 steps.

    Gradients lose more in tiles of 128 x 128, where tokens share a scale, and small tokens lose the most.
    """
    seen = {}
    with opened(trained, small) as made:
        point = Point.of(made.trainers["fp8"])
        for tile in ("1x128", "128x128"):
            override = f'precision.classes={{"*.gradient": {{tile: {tile}}}}}'
            config = make_case(load_config(str(small), [override]), None, None, "bf16", None, CACHE).config
            seen[tile] = Statistics()
            Probe(config, made.groups, made.device).gradients(point, seen[tile])
    for name in (name for name in seen["1x128"].first if name.endswith(".gradient")):
        own, square = seen["1x128"].first[name], seen["128x128"].first[name]
        assert square.underflow >= own.underflow, name
    own, square = (total(seen[tile], "gradient") for tile in ("1x128", "128x128"))
    assert square.underflow > 2 * own.underflow
    assert square.row_error > own.row_error


def total(statistics: Statistics, role: str) -> Any:
    sums = [each for name, each in statistics.first.items() if name.endswith(f".{role}")]
    whole = replace(sums[0])
    for each in sums[1:]:
        whole.add(each)
    return whole


def test_without_fp8_it_says_what_to_set(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(small), "--set", "precision.recipe=bf16"]) == 2
    said = capsys.readouterr().err
    assert "precision.recipe is bf16" in said and "--set precision.recipe=fp8" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["deepseek-v3-671b", "--set", "precision.recipe=fp8"], r"6\d\dB parameters take about [\d,]+ GiB"),
        (["SMALL", "--steps", "0"], "--steps is 0: it must be at least 1"),
        (["SMALL", "--every", "0"], "--every is 0"),
        (["SMALL", "--html", "/nowhere/at/all/page.html"], "there is no folder /nowhere/at/all"),
        (["SMALL", "--out", "SMALL"], "is a file"),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], said: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *(str(small) if word == "SMALL" else word for word in arguments)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_torchrun_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    assert cli.main(["audit", str(small)]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_a_layout_becomes_a_single_process_and_is_reported(small: Path) -> None:
    config = load_config(str(small), ["parallel.ep=2", "parallel.pp=2", "precision.backend=te"])
    case: AuditCase = make_case(config, None, None, "bf16", None, CACHE)
    assert (case.config.parallel.pp, case.config.parallel.ep) == (1, 1)
    assert "a single process instead of pp 2, ep 2" in case.changes[0]
    assert "instead of Transformer Engine" in case.changes[1]


def test_a_folder_of_another_audit_is_left_alone(
    audited: dict[str, Any], small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (audited["folder"] / "steps.jsonl").read_bytes()
    command = ["audit", str(small), "--steps", "10", "--set", FEW, "--out", str(audited["folder"])]
    assert cli.main([*command, "--set", "run.seed=1"]) == 2
    assert "another configuration (run.seed)" in capsys.readouterr().err
    assert cli.main([*command, "--against", "fp32"]) == 2
    assert "an audit against bf16" in capsys.readouterr().err
    assert (audited["folder"] / "steps.jsonl").read_bytes() == before


def test_a_finished_audit_is_reported_again_in_80_columns(
    audited: dict[str, Any], small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = 100 * abs(audited["result"]["loss"]["error"])
    command = ["audit", str(small), "--steps", "10", "--set", FEW, "--out", str(audited["folder"]), "--bound"]
    assert cli.main([*command, f"{error + 0.01}"]) == 0
    said = capsys.readouterr().out
    assert "continues after step 10" in said and "the losses are within" in said
    lines = [line for line in said.splitlines() if str(audited["folder"]) not in line]
    assert max(map(len, lines)) <= 80
    for name in ("mean loss, last step", "gradients of", "quantised", "which class hurts", "together"):
        assert any(line.startswith(name) for line in lines), name
    assert cli.main([*command, f"{error * 0.99}"]) == 1
    assert "NOT within" in capsys.readouterr().out


def test_json_of_a_result_has_the_same_keys_as_ever_and_reads_back(audited: dict[str, Any]) -> None:
    result = audited["result"]
    assert Result.model_validate(result).model_dump() == result
    top = ("model", "steps", "against", "stopped", "loss", "validation", "curve", "looks", "attribution")
    assert tuple(result) == top
    assert tuple(result["model"]) == ("name", "parameters", "tokens", "unigram_entropy", "formats", "changes")
    assert tuple(result["loss"]) == ("last", "fp8", "bf16", "error")
    assert tuple(result["validation"]) == ("fp8", "bf16", "error")
    assert tuple(result["curve"][0]) == ("step", "fp8", "bf16", "error")
    assert tuple(result["looks"][0]) == ("step", "gradients", "moved", "classes", "classes_for_weights")
    assert tuple(result["attribution"]) == ("together", "entries")
    for entry in result["attribution"]["entries"].values():
        assert tuple(entry) == ("alone", "without", "classes")


def test_the_page_needs_nothing_from_elsewhere(audited: dict[str, Any]) -> None:
    page, result = audited["page"], audited["result"]
    assert not re.search(r"<script|<link|<img|@import|url\(|href", page)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        numbers = [float(value) for value in re.findall(r"[ML ](-?\d+\.\d)\b", picture)]
        assert ElementTree.fromstring(picture) is not None and numbers and "nan" not in picture
    for name in (*result["looks"][-1]["classes"], *result["attribution"]["entries"]):
        assert f">{name}<" in page, name
    assert f"{100 * result['loss']['error']:+.3f} %" in page
