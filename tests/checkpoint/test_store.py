"""Checkpoints: complete or invisible, the same in every layout, and never read wrongly."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from counterflow.checkpoint import store
from counterflow.checkpoint.manifest import complete_steps, read_manifest
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.settings import UsageError
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker

EXPERTS = 4
MODEL = {"hidden_size": 5}
# Rows that no number of ranks divides, fewer rows than ranks, one dimension, both formats, and a replicated tensor.
DENSE = {"odd": (7, 5), "few": (3, 4), "single": (1, 6), "gain": (9,), "even": (8, 3)}
BF16 = {"exp_avg.odd": (7, 5), "exp_avg.gain": (9,)}
SHAPES = {
    **{f"weights.{name}": shape for name, shape in DENSE.items()},
    **BF16,
    **{f"weights.experts.{expert}.w1": (6, 2) for expert in range(EXPERTS)},
    "weights.gate.bias": (4,),
}
LAYOUTS = [(1, 1), (2, 2), (4, 4), (2, 1), (4, 2), (8, 4)]  # world size, ep
PAIRS = [((1, 1), (8, 4)), ((8, 4), (1, 1)), ((4, 2), (4, 4)), ((4, 4), (2, 1)), ((2, 2), (4, 1)), ((8, 1), (4, 2))]


def whole(name: str) -> Tensor:
    """Value of a global tensor: any bits except those of NaN."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    value = torch.randn(SHAPES[name], generator=generator)
    return value.bfloat16() if name in BF16 else value


def place(name: str, value: Tensor, groups: Groups) -> DTensor:
    """Return this rank's part of a global tensor."""
    mesh = groups.replicas("edp" if ".experts." in name else "dp")
    placement: Placement = Shard(0)
    if name.endswith("bias"):
        placement, local = Replicate(), value.clone()
    else:
        per_rank = -(-value.shape[0] // mesh.size())
        local = value[mesh.get_local_rank() * per_rank :][:per_rank].clone()
    stride = value.stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=value.shape, stride=stride)


def state(groups: Groups, value: Callable[[str], Tensor]) -> dict[str, DTensor]:
    """Parts of a state that a rank holds: all dense tensors, and its experts."""
    per_rank = EXPERTS // groups.layout.ep
    first = groups.coordinates.ep * per_rank
    others = {f"weights.experts.{e}.w1" for e in range(EXPERTS) if not first <= e < first + per_rank}
    return {name: place(name, value(name), groups) for name in SHAPES if name not in others}


def _save(worker: Worker, ep: int, folder: Path, steps: list[int], keep: int = 0) -> list[Path]:
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    tensors = state(groups, whole)
    return [store.save(folder, step, tensors, MODEL, {"step": step}, groups.world, keep) for step in steps]


def _load(worker: Worker, ep: int, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    tensors = state(groups, lambda name: torch.full_like(whole(name), 9.0))
    progress = store.load(path, tensors, MODEL, groups.world)
    return progress, {name: gathered(tensor) for name, tensor in tensors.items()}


def _refusal(worker: Worker, ep: int, path: Path, change: Callable[[dict[str, DTensor], Groups], None]) -> str:
    """Error of loading into a changed state on this rank."""
    groups = Groups.create(Layout(worker.world_size, 1, ep), "cpu")
    tensors = state(groups, whole)
    change(tensors, groups)
    try:
        store.load(path, tensors, MODEL, groups.world)
    except UsageError as error:
        return str(error)
    return "accepted"


def unchanged(tensors: dict[str, DTensor], groups: Groups) -> None:
    pass


@pytest.fixture
def saved(pool: Pool, tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    return pool.run(_save, 2, 2, tmp_path / "checkpoints", [4])[0][0]


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda layout: f"{layout[0]}-ranks-ep{layout[1]}")
def test_every_layout_reads_every_others_bit_for_bit(
    pool: Pool, tmp_path: Path, writer: tuple[int, int], reader: tuple[int, int]
) -> None:
    path = pool.run(_save, *writer, tmp_path, [3])[0][0]
    seen = set()
    for progress, tensors in pool.run(_load, *reader, path):
        assert progress == {"step": 3}
        for name, tensor in tensors.items():
            assert tensor.dtype == whole(name).dtype
            assert torch.equal(tensor, whole(name)), name
        seen |= tensors.keys()
    assert seen == SHAPES.keys()


def checksum(tensor: Tensor) -> int:
    """Checksum by the manifest's formula, in Python's own integers."""
    bits = tensor.flatten().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()
    return sum(value * (2 * index + 1) for index, value in enumerate(bits)) % 2**64


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_a_checkpoint_holds_every_global_tensor_exactly_once(pool: Pool, tmp_path: Path, world: int, ep: int) -> None:
    path = pool.run(_save, world, ep, tmp_path, [1])[0][0]
    records = read_manifest(path).tensors
    assert records.keys() == SHAPES.keys()
    for name, record in records.items():
        assert (record.shape, record.dtype) == (tuple(whole(name).shape), str(whole(name).dtype))
        assert record.checksum == checksum(whole(name)), name
    index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert index.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        written = torch.zeros(shape, dtype=torch.int64)
        for chunk in index[name].chunks:
            written[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert (written == 1).all(), name


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 9, 10]), (1, [10]), (3, [2, 9, 10])])
def test_the_newest_are_kept(pool: Pool, tmp_path: Path, keep: int, left: list[int]) -> None:
    pool.run(_save, 1, 1, tmp_path, [1, 2, 9, 10], keep)
    assert list(complete_steps(tmp_path)) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step-{step}" for step in left)
    assert pool.run(_load, 1, 1, tmp_path / "step-10")[0][0] == {"step": 10}


def test_a_step_saved_again_replaces_the_first(pool: Pool, tmp_path: Path) -> None:
    pool.run(_save, 2, 1, tmp_path, [5, 5])
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]
    assert pool.run(_load, 2, 2, tmp_path / "step-5")[0][0] == {"step": 5}


def _cut_short(worker: Worker, folder: Path, owner: Any, name: str, calls_before: int) -> None:
    """Save step 1, then step 2 up to some call of `owner.name`; nothing after the call runs, as with kill -9."""
    groups = Groups.create(Layout(1), "cpu")
    tensors = state(groups, whole)
    store.save(folder, 1, tensors, MODEL, {"step": 1}, groups.world, keep=1)
    original, calls = getattr(owner, name), []

    def end(*args: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) <= calls_before:
            return original(*args, **keys)
        if name == "rmtree":
            next(args[0].iterdir()).unlink()  # the removal has begun
        raise SystemExit("killed")

    with mock.patch.object(owner, name, end), contextlib.suppress(SystemExit, RuntimeError):
        store.save(folder, 2, tensors, MODEL, {"step": 2}, groups.world, keep=1)
    assert len(calls) == calls_before + 1, "the save should have been cut short"


@pytest.mark.parametrize(
    ("owner", "name", "calls_before", "usable"),
    [
        (dcp, "save", 0, 1),
        (Path, "rename", 0, 1),  # of the index, by dcp
        (store, "_write_synced", 0, 1),
        (store, "_sync_folder", 0, 1),
        (Path, "rename", 1, 1),  # of the whole checkpoint
        (store, "_sync_folder", 1, 2),
        (store, "_remove", 0, 2),
        (shutil, "rmtree", 0, 2),  # of the old checkpoint
    ],
)
def test_a_save_cut_short_leaves_a_whole_checkpoint_and_nothing_half_done_in_sight(
    pool: Pool, tmp_path: Path, owner: Any, name: str, calls_before: int, usable: int
) -> None:
    pool.run(_cut_short, 1, tmp_path, owner, name, calls_before)
    steps = complete_steps(tmp_path)
    for path in steps.values():
        read_manifest(path)
    assert max(steps) == usable
    assert pool.run(_load, 1, 1, steps[usable])[0][0] == {"step": usable}
    pool.run(_save, 1, 1, tmp_path, [3], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"], "files left over are gone"


def _full_disk(worker: Worker, folder: Path) -> str:
    groups = Groups.create(Layout(worker.world_size), "cpu")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(dcp.FileSystemWriter, "write_data", fail):
        try:
            store.save(folder, 2, state(groups, whole), MODEL, {}, groups.world)
        except RuntimeError as error:
            return str(error)
    return "saved"


def test_a_full_disk_is_said_in_one_line_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(_full_disk, 2, tmp_path):
        assert said == (
            f"checkpoint {tmp_path / 'step-2'} could not be written: OSError: [Errno 28] No space left on device"
        )
    assert complete_steps(tmp_path) == {}


def _failing_disk(worker: Worker, path: Path, error: Exception, on_rank: int) -> tuple[str, str]:
    """Kind and message of the error of loading if reading fails on one rank."""
    groups = Groups.create(Layout(worker.world_size, 1, 2), "cpu")
    read = dcp.FileSystemReader.read_data

    def fail(*args: Any) -> Any:
        if worker.rank == on_rank:
            raise error
        return read(*args)

    with mock.patch.object(dcp.FileSystemReader, "read_data", fail):
        try:
            store.load(path, state(groups, whole), MODEL, groups.world)
        except (RuntimeError, UsageError) as raised:
            return type(raised).__name__, str(raised)
    return "nothing", "loaded"


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.EIO, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (MemoryError("no room"), "MemoryError: no room"),
    ],
)
def test_trouble_of_the_machine_while_reading_blames_no_checkpoint(
    pool: Pool, saved: Path, error: Exception, what: str, on_rank: int
) -> None:
    for kind, said in pool.run(_failing_disk, 2, saved, error, on_rank):
        assert kind == "RuntimeError"
        assert said == f"checkpoint {saved} could not be read: {what}"
    assert {progress["step"] for progress, _ in pool.run(_load, 2, 2, saved)} == {4}


def test_a_data_file_that_goes_missing_while_reading_is_the_checkpoints_fault(pool: Pool, saved: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "__0_0.distcp")
    for kind, said in pool.run(_failing_disk, 2, saved, missing, 1):
        assert kind == "UsageError"
        assert said.startswith(f"checkpoint {saved} is torn: ")
        assert said.endswith(f"; delete {saved} to start again")


def _spoil_and_load(worker: Worker, path: Path, seed: int, times: int) -> list[str]:
    """Flip one bit of the data files at a time; return the errors of loading, "harmless" where no value changed."""
    draw = random.Random(seed)
    files = sorted(path.glob("*.distcp"))
    groups = Groups.create(Layout(1), "cpu")
    found = []
    for _ in range(times):
        file = draw.choice(files)
        good = file.read_bytes()
        position = draw.randrange(len(good))
        spoilt = bytearray(good)
        spoilt[position] ^= 1 << draw.randrange(8)
        file.write_bytes(spoilt)
        tensors = state(groups, lambda name: torch.zeros_like(whole(name)))
        try:
            store.load(path, tensors, MODEL, groups.world)
            harmless = all(torch.equal(tensor.to_local(), whole(name)) for name, tensor in tensors.items())
            found.append("harmless" if harmless else "read wrongly")
        except UsageError as error:
            found.append(str(error))
        file.write_bytes(good)
    return found


def test_a_changed_bit_is_never_read_as_a_number(pool: Pool, saved: Path) -> None:
    (found,) = pool.run(_spoil_and_load, 1, saved, 0, 150)
    refused = [said for said in found if said != "harmless"]
    assert len(refused) > 20
    for said in refused:
        assert said.startswith((f"checkpoint {saved} is damaged: ", f"checkpoint {saved} is torn: ")), said
        assert said.endswith(f"; delete {saved} to start again")
        assert len(said.splitlines()) == 1


def test_a_changed_number_names_its_tensor(pool: Pool, saved: Path) -> None:
    name = "weights.odd"
    for file in saved.glob("*.distcp"):
        content = file.read_bytes()
        row = whole(name)[0].numpy().tobytes()
        if row in content:
            file.write_bytes(content.replace(row, whole(name)[0].flip(0).numpy().tobytes()))
    for said in pool.run(_refusal, 2, 2, saved, unchanged):
        assert f"is damaged: 1 tensors are not as they were written, such as {name}" in said


def _drop(tensors: dict[str, DTensor], groups: Groups) -> None:
    del tensors["weights.odd"], tensors["weights.gain"]


def _add(tensors: dict[str, DTensor], groups: Groups) -> None:
    tensors["weights.new"] = place("weights.new", torch.zeros(3, 3), groups)


def _widen(tensors: dict[str, DTensor], groups: Groups) -> None:
    tensors["weights.odd"] = place("weights.odd", torch.zeros(7, 6), groups)


def _store_moments_in_fp32(tensors: dict[str, DTensor], groups: Groups) -> None:
    tensors["exp_avg.odd"] = place("exp_avg.odd", torch.zeros(7, 5), groups)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_drop, "2 tensors are in it and unknown here, such as weights.gain"),
        (_add, "1 tensors are missing in it, such as weights.new"),
        (_widen, "weights.odd is torch.float32 [7, 5] in it and torch.float32 [7, 6] here"),
        (
            _store_moments_in_fp32,
            "exp_avg.odd is torch.bfloat16 [7, 5] in it and torch.float32 [7, 5] here; did optim.moments change?",
        ),
    ],
)
def test_another_set_of_tensors_is_refused_by_name(
    pool: Pool, saved: Path, change: Callable[[dict[str, DTensor], Groups], None], line: str
) -> None:
    for said in pool.run(_refusal, 2, 1, saved, change):
        assert said.splitlines() == [f"checkpoint {saved} does not hold the state of this run:", f"  {line}"]
