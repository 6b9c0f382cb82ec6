"""Manifest that distinguishes a whole checkpoint from a torn one and from another model's, without reading tensors."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    TensorRecord,
    check_same_model,
    complete_steps,
    digest_of,
    read_manifest,
)
from counterflow.model.config import ModelConfig
from counterflow.settings import UsageError

MODEL = ModelConfig(hidden_size=64, num_hidden_layers=4, first_k_dense_replace=1).model_dump(mode="json")
TENSORS = {
    "weights.head": TensorRecord((320, 64), "torch.float32", 2**64 - 3),
    "exp_avg.head": TensorRecord((), "x", 0),
}


def write(path: Path, model: dict[str, Any] = MODEL) -> Path:
    """Write a checkpoint with arbitrary data files."""
    path.mkdir(parents=True)
    (path / INDEX).write_bytes(b"where everything is")
    (path / "__0_0.distcp").write_bytes(b"tensors" * 100)
    files = {name: (path / name).stat().st_size for name in (INDEX, "__0_0.distcp")}
    manifest = Manifest(model, {"step": 7, "tokens": 1e30}, TENSORS, files, digest_of(path / INDEX))
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoints" / "step-7")


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as refused:
        read_manifest(path)
    return str(refused.value)


def test_a_written_manifest_is_read_back(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert (manifest.model, manifest.progress, manifest.tensors) == (MODEL, {"step": 7, "tokens": 1e30}, TENSORS)
    check_same_model(manifest, MODEL, checkpoint)


@pytest.mark.parametrize("name", [MANIFEST, INDEX, "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_file_that_is_not_whole_is_found(checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    said = refusal(checkpoint)
    assert said.startswith(f"checkpoint {checkpoint} is torn: ")
    assert name in said
    assert said.endswith(f"; delete {checkpoint} to start again")


def test_a_changed_bit_is_found_wherever_it_is(checkpoint: Path) -> None:
    draw = random.Random(0)
    for name in (MANIFEST, INDEX):
        whole = (checkpoint / name).read_bytes()
        for _ in range(100):
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << bit
            (checkpoint / name).write_bytes(spoilt)
            if name == MANIFEST and _same_json(whole, bytes(spoilt)):
                continue
            assert "checkpoint" in refusal(checkpoint), (name, place, bit)
        (checkpoint / name).write_bytes(whole)


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether two texts are the same JSON, as after a blank became a tab."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format": 1}', '{"format": 1, "digest": "x", "tensors": []}']
)
def test_a_file_that_is_no_manifest_is_torn_and_not_a_crash(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert "is torn: manifest.json cannot be read" in refusal(checkpoint)


def test_a_later_format_is_named(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text('{"format": 9, "anything": "else"}')
    assert refusal(checkpoint) == f"checkpoint {checkpoint} has format 9; this version reads format 1"


def test_the_remedy_names_the_checkpoint_before(checkpoint: Path) -> None:
    for step in (2, 5):
        shutil.copytree(checkpoint, checkpoint.with_name(f"step-{step}"))
    (checkpoint / MANIFEST).unlink()
    assert refusal(checkpoint).endswith(f"; delete {checkpoint} to continue from step-5")


def test_steps_are_in_the_order_of_their_numbers_and_unfinished_ones_are_not_seen(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-1000", ".step-11.unfinished", ".step-8.removed", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert list(complete_steps(tmp_path)) == [9, 10, 1000]
    assert complete_steps(tmp_path / "absent") == {}


def test_another_model_is_refused_with_every_difference(checkpoint: Path) -> None:
    other = ModelConfig(hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1, q_lora_rank=None)
    with pytest.raises(UsageError) as refused:
        check_same_model(read_manifest(checkpoint), other.model_dump(mode="json"), checkpoint)
    assert str(refused.value).splitlines() == [
        f"checkpoint {checkpoint} is of another model:",
        "  model.hidden_size: 64 in the checkpoint, 128 in the config",
        "  model.q_lora_rank: 1536 in the checkpoint, null in the config",
        "use the config it was written with, or another run.name",
    ]


def test_a_longer_context_is_the_same_model(checkpoint: Path) -> None:
    longer = MODEL | {"max_position_embeddings": 32768, "rope_scaling": {"factor": 40.0}, "initializer_range": 0.1}
    check_same_model(read_manifest(checkpoint), longer, checkpoint)


def test_a_checkpoint_without_a_recorded_router_is_of_v3s(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    old = {name: value for name, value in manifest.model.items() if name not in ("topk_method", "scoring_func")}
    assert len(old) == len(manifest.model) - 2
    manifest = replace(manifest, model=old)
    check_same_model(manifest, MODEL, checkpoint)
    with pytest.raises(UsageError, match=r'model\.topk_method: "noaux_tc" in the checkpoint, "greedy" in the config'):
        check_same_model(manifest, MODEL | {"topk_method": "greedy"}, checkpoint)
