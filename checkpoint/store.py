"""Writing and reading checkpoints: sharded, atomic, and the same whatever the layout.

The tensors are DTensors under global names, so torch.distributed.checkpoint reshards them between layouts. A
checkpoint is written to a hidden folder, synced to disk and renamed: it is complete or it is not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..settings import UsageError
from .manifest import MANIFEST, Manifest, TensorRecord, check_same_model, complete_steps, read_manifest

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
    """Write checkpoint `step-N` into `folder`; every rank of `group` calls it with its own part of the tensors.

    `model` describes the architecture, `progress` is returned by `load`. Older checkpoints beyond the newest `keep`
    are removed once the new one is complete (0 keeps all).
    """
    final, aside = folder / f"step-{step}", folder / f".step-{step}.unfinished"
    first = dist.get_rank(group) == 0
    if first:
        for left_over in folder.glob(".step-*"):
            shutil.rmtree(left_over)
        aside.mkdir(parents=True)
    dist.barrier(group)
    writer = dcp.FileSystemWriter(aside, sync_files=True)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    records = _collect_records(tensors, group)
    if first:
        assert records is not None
        files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        _write_synced(aside / MANIFEST, Manifest(model, progress, records, files).to_json())
        _sync_folder(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_folder(folder)
        for old in list(complete_steps(folder).values())[: -keep if keep else 0]:
            shutil.rmtree(old)
    dist.barrier(group)
    return final


def load(path: Path, tensors: Mapping[str, DTensor], model: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """Fill `tensors` from checkpoint `path`, written in any layout, and return its progress.

    Raises UsageError if it is torn, of another model, lacks or has extra tensors, or if what was read does not have
    the checksums that were written.
    """
    manifest = read_manifest(path)
    check_same_model(manifest, model, path)
    dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), process_group=group)
    verdict: list[str | None] = [None]
    records = _collect_records(tensors, group)
    if records is not None:
        verdict[0] = _compare(manifest.tensors, records)
    dist.broadcast_object_list(verdict, group=group, group_src=0)
    if verdict[0] is not None:
        raise UsageError(f"checkpoint {path} cannot be used: {verdict[0]}")
    return manifest.progress


def _compare(written: Mapping[str, TensorRecord], read: Mapping[str, TensorRecord]) -> str | None:
    missing, extra = sorted(read.keys() - written.keys()), sorted(written.keys() - read.keys())
    if missing or extra:
        return f"{len(missing)} tensors are missing ({missing[:3]}), {len(extra)} are unknown ({extra[:3]})"
    damaged = [name for name, record in written.items() if record != read[name]]
    return f"{len(damaged)} tensors differ from what was written, first {damaged[0]}" if damaged else None


def _collect_records(tensors: Mapping[str, DTensor], group: dist.ProcessGroup) -> dict[str, TensorRecord] | None:
    """Records of all global tensors on the first rank, None elsewhere; asserts that every element is held once."""
    mine = {name: (tuple(t.shape), str(t.dtype), *_partial_checksum(t)) for name, t in tensors.items()}
    first = dist.get_rank(group) == 0
    parts: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(mine, parts, group=group, group_dst=0)
    if parts is None:
        return None
    elements: dict[str, int] = {}
    records: dict[str, TensorRecord] = {}
    for part in parts:
        for name, (shape, dtype, count, checksum) in part.items():
            elements[name] = elements.get(name, 0) + count
            before = records[name].checksum if name in records else 0
            records[name] = TensorRecord(shape, dtype, (before + checksum) % 2**64)
    for name, record in records.items():
        assert elements[name] == torch.Size(record.shape).numel(), (
            f"{name}: {elements[name]} elements of {record.shape}"
        )
    return records


@torch.no_grad()
def _partial_checksum(tensor: DTensor) -> tuple[int, int]:
    """How many elements this rank answers for, and their part of the tensor's checksum.

    The checksum is the sum over all elements of bits * (2 * index + 1) mod 2^64: parts add up in any order, so it
    does not depend on the sharding, and exchanging two different elements changes it.
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
        total += int((piece * (2 * index + 1)).sum())  # int64 arithmetic wraps, which is what mod 2^64 wants
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
