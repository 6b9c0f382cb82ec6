"""Saving and loading of checkpoints: sharded, atomic, and the same in every layout.

The tensors are DTensors under global names, so torch.distributed.checkpoint reshards them between layouts. A
checkpoint is written to a hidden folder, synced to disk and renamed. It is therefore either complete or absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..settings import UsageError
from .manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    TensorRecord,
    check_same_model,
    complete_steps,
    digest_of,
    read_manifest,
    remedy,
)

T = TypeVar("T")

_SUM_CHUNK = 2**22


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, DTensor],
    model: dict[str, Any],
    progress: dict[str, Any],
    group: dist.ProcessGroup,
    keep: int = 0,
) -> Path:
    """Write checkpoint `step-N` into `folder`; every rank of `group` calls this with its own part of the tensors.

    `model` describes the architecture, `progress` is returned by `load`. All but the newest `keep` checkpoints are
    removed once the new one is complete (0 keeps all).
    """
    final, unfinished = folder / f"step-{step}", folder / f".step-{step}.unfinished"
    first = dist.get_rank(group) == 0
    if first:
        for left_over in folder.glob(".step-*"):
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
    dist.barrier(group)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(unfinished, sync_files=True), process_group=group)
    except CheckpointException as error:
        raise RuntimeError(f"checkpoint {final} could not be written: {_cause(error)}") from None
    records = _collect_records(tensors, group)
    if first:
        assert records is not None
        files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        manifest = Manifest(model, progress, records, files, digest_of(unfinished / INDEX))
        _write_synced(unfinished / MANIFEST, manifest.to_json())
        _sync_folder(unfinished)
        if final.exists():
            _remove(final)
        unfinished.rename(final)
        _sync_folder(folder)
        for old in list(complete_steps(folder).values())[: -keep if keep else 0]:
            _remove(old)
    dist.barrier(group)
    return final


def load(
    path: Path,
    tensors: Mapping[str, DTensor],
    model: dict[str, Any],
    group: dist.ProcessGroup,
    optional: str | None = None,
) -> dict[str, Any]:
    """Fill `tensors` from checkpoint `path`, written in any layout, and return its progress.

    Tensors whose names begin with `optional` are filled only if both the checkpoint and `tensors` have such tensors.
    Raises UsageError if the checkpoint is torn, is of another model, lacks tensors or has extra ones, or if the
    tensors read do not have the checksums that were written.
    """
    manifest = read_manifest(path)
    check_same_model(manifest, model, path)
    written = manifest.tensors
    if optional is not None:
        if not any(name.startswith(optional) for name in written):
            tensors = _without(tensors, optional)
        elif not any(name.startswith(optional) for name in tensors):
            written = _without(written, optional)
    wanted = _gather({name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}, group)
    _refuse(path, None if wanted is None else _find_mismatch(written, wanted), group)
    try:
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), process_group=group)
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        if isinstance(cause, (OSError, MemoryError, torch.OutOfMemoryError)) and not isinstance(
            cause, FileNotFoundError
        ):
            # A fault of the machine, not of the checkpoint, so deleting the checkpoint is no remedy.
            raise RuntimeError(f"checkpoint {path} could not be read: {_cause(error)}") from None
        raise UsageError(f"checkpoint {path} is torn: {_cause(error)}; {remedy(path)}") from None
    read = _collect_records(tensors, group)
    _refuse(path, None if read is None else _find_damage(written, read, path), group)
    return manifest.progress


def _without(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name: value for name, value in named.items() if not name.startswith(prefix)}


def _refuse(path: Path, fault: str | None, group: dist.ProcessGroup) -> None:
    """Raise UsageError on every rank if the first one has found a fault."""
    verdict = [fault]
    dist.broadcast_object_list(verdict, group=group, group_src=0)
    if verdict[0] is not None:
        raise UsageError(f"checkpoint {path} {verdict[0]}")


def _find_mismatch(
    written: Mapping[str, TensorRecord], parts: list[dict[str, tuple[tuple[int, ...], str]]]
) -> str | None:
    """Differences of the written tensors from those of this run in names, shapes or formats, or None."""
    wanted = {name: form for part in parts for name, form in part.items()}
    lines = []
    for names, fault in (
        (wanted.keys() - written.keys(), "missing in it"),
        (written.keys() - wanted.keys(), "in it and unknown here"),
    ):
        if names:
            lines.append(f"  {len(names)} tensors are {fault}, such as {min(names)}")
    for name in sorted(wanted.keys() & written.keys()):
        record, (shape, dtype) = written[name], wanted[name]
        if (record.shape, record.dtype) != (shape, dtype):
            in_it, here = f"{record.dtype} {list(record.shape)}", f"{dtype} {list(shape)}"
            hint = "; did optim.moments change?" if record.shape == shape else ""
            lines.append(f"  {name} is {in_it} in it and {here} here{hint}")
            break
    return "\n".join(["does not hold the state of this run:", *lines]) if lines else None


def _find_damage(written: Mapping[str, TensorRecord], read: Mapping[str, TensorRecord], path: Path) -> str | None:
    damaged = sorted(name for name, record in written.items() if record != read[name])
    if not damaged:
        return None
    return f"is damaged: {len(damaged)} tensors are not as they were written, such as {damaged[0]}; {remedy(path)}"


def _cause(error: CheckpointException) -> str:
    """Reason of the first failed rank; `CheckpointException` itself prints every rank's stack, and is no Exception."""
    cause, _ = error.failures[min(error.failures)]
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def _remove(path: Path) -> None:
    """Delete a checkpoint; a process that is killed half-way leaves no torn checkpoint."""
    removed = path.with_name(f".{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def _collect_records(tensors: Mapping[str, DTensor], group: dist.ProcessGroup) -> dict[str, TensorRecord] | None:
    """Records of all global tensors on the first rank, None elsewhere; asserts that every element is held once."""
    own = {name: (tuple(t.shape), str(t.dtype), *_partial_checksum(t)) for name, t in tensors.items()}
    parts = _gather(own, group)
    if parts is None:
        return None
    elements: dict[str, int] = {}
    records: dict[str, TensorRecord] = {}
    for part in parts:
        for name, (shape, dtype, count, checksum) in part.items():
            elements[name] = elements.get(name, 0) + count
            sum_so_far = records[name].checksum if name in records else 0
            records[name] = TensorRecord(shape, dtype, (sum_so_far + checksum) % 2**64)
    for name, record in records.items():
        assert elements[name] == torch.Size(record.shape).numel(), (
            f"{name}: {elements[name]} elements of {record.shape}"
        )
    return records


def _gather(own: T, group: dist.ProcessGroup) -> list[T] | None:
    """Return the objects of all ranks on the first rank, None elsewhere."""
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(own, parts, group=group, group_dst=0)
    return parts


@torch.no_grad()
def _partial_checksum(tensor: DTensor) -> tuple[int, int]:
    """Number of elements that this rank counts, and their part of the tensor's checksum.

    The checksum is the sum over all elements of bits * (2 * index + 1) mod 2^64. Parts add up in any order, so the
    checksum does not depend on the sharding; exchanging two different elements changes the checksum.
    """
    placement, mesh = tensor.placements[0], tensor.device_mesh
    local = tensor.to_local().contiguous().view(-1)
    offset = 0
    if isinstance(placement, Replicate):
        if mesh.get_local_rank() != 0:
            return 0, 0
    else:
        assert isinstance(placement, Shard) and placement.dim == 0, placement
        rows_per_rank = -(-tensor.shape[0] // mesh.size())
        offset = mesh.get_local_rank() * rows_per_rank * (tensor.numel() // tensor.shape[0])
    bits = local.view({2: torch.int16, 4: torch.int32}[local.element_size()])
    total = 0
    for start in range(0, bits.numel(), _SUM_CHUNK):
        piece = bits[start : start + _SUM_CHUNK].long()
        index = torch.arange(offset + start, offset + start + piece.numel(), device=piece.device)
        total += int((piece * (2 * index + 1)).sum())  # int64 arithmetic wraps, as mod 2^64 does
    return local.numel(), total % 2**64


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
