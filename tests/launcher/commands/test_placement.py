"""`counterflow placement`: from measured loads to a placement that inference engines read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.checkpoint.manifest import MANIFEST, Manifest, digest_of
from counterflow.launcher.cli import main
from counterflow.parallel.experts.placement import loads_of_ranks, place_replicas

LOADS = [[40, 10, 10, 10, 5, 5, 10, 10], [10] * 8, [1, 2, 3, 4, 5, 6, 7, 8]]
MODEL = {"n_routed_experts": 8, "first_k_dense_replace": 2, "num_hidden_layers": 4, "n_group": 4, "topk_group": 2,
         "num_experts_per_tok": 2}  # fmt: skip


def write_checkpoint(folder: Path, step: int, progress: dict[str, Any], **model: int | str) -> Path:
    """Write the files of a checkpoint that this command reads."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"index")
    manifest = Manifest({**MODEL, **model}, {"step": step, **progress}, {}, {}, digest_of(path / ".metadata"))
    (path / MANIFEST).write_text(manifest.to_json())
    return path


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two decoder layers of experts and an MTP module, measured over 20 steps."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/small")
    write_checkpoint(folder / "checkpoints", 80, {})
    write_checkpoint(folder / "checkpoints", 100, {"expert_loads": {"steps": 20, "tokens": LOADS}})
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["placement", *words, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_run_is_placed_by_the_loads_of_its_last_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, str(run_dir), "--ranks", "4", "--nodes", "2", "--replicas", "12")
    assert found["measured"] == f"steps 81 to 100, {run_dir}/checkpoints/step-100"
    assert found["layers"] == ["2", "3", "mtp.0"]
    assert (found["groups"], found["nodes"], found["ranks"], found["replicas"]) == (4, 2, 4, 12)
    for loads, physical, before, after in zip(
        LOADS, found["phy2log"], found["imbalance_before"], found["imbalance_after"], strict=True
    ):
        assert physical == list(place_replicas(loads, 12, 4, 2, 4).physical_to_logical)
        mean = sum(loads) / 4
        assert before == pytest.approx(max(sum(loads[i : i + 2]) for i in range(0, 8, 2)) / mean)
        assert after == pytest.approx(max(loads_of_ranks(loads, physical, 4)) / mean)


def test_logical_and_physical_maps_are_those_of_eplb(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes [L, P], [L, E, X] padded with -1, and [L, E]; the two maps are inverse to each other."""
    found = printed(capsys, str(run_dir / "checkpoints" / "step-100"), "--ranks", "2", "--replicas", "14")
    physical, logical, counts = (torch.tensor(found[name]) for name in ("phy2log", "log2phy", "counts"))
    assert physical.shape == (3, 14) and counts.shape == (3, 8) and logical.shape == (3, 8, int(counts.max()))
    assert torch.equal((logical >= 0).sum(-1), counts)
    for layer in range(3):
        for expert in range(8):
            places = logical[layer, expert]
            assert (physical[layer, places[places >= 0]] == expert).all()


def test_the_written_map_has_a_row_for_every_decoder_layer(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, str(run_dir), "--ranks", "4", "--replicas", "12", "--write", "map.json")
    written = json.loads(Path("map.json").read_text())
    in_order = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert written == {"physical_to_logical_map": [in_order, in_order, *found["phy2log"][:2]]}


def test_a_router_without_a_limit_has_no_groups_to_keep(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"expert_loads": {"steps": 5, "tokens": LOADS}}
    greedy = write_checkpoint(Path("greedy"), 5, progress, topk_method="greedy")
    assert printed(capsys, str(greedy), "--ranks", "2")["groups"] == 1
    free = write_checkpoint(Path("free"), 5, progress, topk_group=4)
    assert printed(capsys, str(free), "--ranks", "2")["groups"] == 1
    assert printed(capsys, str(free), "--ranks", "2", "--groups", "2")["groups"] == 2


@pytest.mark.parametrize("content", [LOADS, {"loads": LOADS, "groups": 2}], ids=["list", "object"])
def test_loads_may_come_from_a_file(
    run_dir: Path, capsys: pytest.CaptureFixture[str], content: list[list[int]] | dict[str, Any]
) -> None:
    Path("loads.json").write_text(json.dumps(content))
    found = printed(capsys, "loads.json", "--ranks", "2", "--nodes", "2", "--write", "map.json")
    assert found["groups"] == (1 if isinstance(content, list) else 2)
    assert json.loads(Path("map.json").read_text()) == {"physical_to_logical_map": found["phy2log"]}


def test_the_table_fits_a_terminal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["placement", str(run_dir), "--ranks", "4", "--nodes", "2", "--replicas", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "loads: steps 81 to 100, runs/small/checkpoints/step-100",
        "8 experts at 12 places on 4 ranks of 2 nodes; 4 groups stay on their nodes",
        "busiest rank, x the mean:",
    ]
    assert lines[3].split("  ") == ["layer", "in order", "placed", "experts with replicas", "most of one"]
    assert [line.split()[0] for line in lines[4:]] == ["2", "3", "mtp.0", "mean"]
    # Groups 0 and 2 share a node, 60 of 100 tokens, and expert 0 gets the two places left there: a rank gets
    # 40/3 + 40/3 + 5, the mean is 25. On the other node two experts of 10 have two places each.
    assert lines[4].split() == ["2", "2.00", "1.27", "3", "3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/small", "--ranks", "3", "--replicas", "10"], "nearest: 9 or 12"),
        (["runs/small", "--ranks", "0"], "--ranks is 0: it must be at least 1"),
        (["runs/small", "--ranks", "2", "--groups", "3"], "groups 3 must divide the 8 experts (nearest: 2 or 4)"),
        (["runs/small/checkpoints/step-80", "--ranks", "2"], "step-80 has no expert loads"),
        (["runs/fresh/step-1", "--ranks", "2"], "step-1 has the loads of no step yet"),
        (["runs/dense/step-1", "--ranks", "2"], "step-1 has no mixture-of-experts layers"),
        (["runs", "--ranks", "2"], "runs is neither a checkpoint nor a run folder with one in runs/checkpoints"),
        (["missing", "--ranks", "2"], "missing does not exist: give a run folder, a checkpoint or a JSON file"),
        (["torn.json", "--ranks", "2"], "torn.json cannot be read as JSON"),
        (["keys.json", "--ranks", "2"], "got the keys 'load'"),
        (["flat.json", "--ranks", "2"], "expected a list with one list of loads per layer"),
        (["words.json", "--ranks", "2"], 'layer 1 has the load "many": expected a number'),
        (["uneven.json", "--ranks", "2"], "layer 1 has 1 experts, layer 0 has 2"),
        (["nan.json", "--ranks", "2"], "loads must be finite numbers that are not negative"),
        (["groups.json", "--ranks", "2"], 'groups is "two": expected a whole number'),
        (["runs/small", "--ranks", "2", "--write", "no/map.json"], "--write no/map.json: No such file or directory"),
    ],
)
def test_impossible_placements_are_refused_with_what_would_work(
    run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_checkpoint(Path("runs/fresh"), 1, {"expert_loads": {"steps": 0, "tokens": LOADS}})
    write_checkpoint(Path("runs/dense"), 1, {"expert_loads": {"steps": 1, "tokens": []}})
    files = {
        "torn": '{"loads": [[1, 2]',
        "keys": '{"load": [[1, 2]]}',
        "flat": "[1, 2, 3]",
        "words": '[[1, 2], [1, "many"]]',
        "uneven": "[[1, 2], [1]]",
        "nan": "[[1, NaN]]",
        "groups": '{"loads": [[1, 2]], "groups": "two"}',
    }
    for name, content in files.items():
        Path(f"{name}.json").write_text(content)
    assert main(["placement", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_needs_no_torch() -> None:
    code = "import sys, counterflow.launcher.commands.placement; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
