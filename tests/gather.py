"""Whole tensors from their shards, for tests that compare them with a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(tensor: DTensor) -> Tensor:
    """Copy of the whole tensor. Every rank of the tensor's mesh calls this; the mesh has one dimension.

    `DTensor.full_tensor` would kill a process on gloo now and then. It gathers by torch's functional collectives, whose
    works gloo names ALLGATHER_COALESCED. A gloo thread that has finished a work writes the work's name into a string of
    the group, without a lock (`ProcessGroupGloo::runLoop` of torch 2.13), and a group has two such threads. A name of
    more than 15 letters lies on the heap, so two threads at once free it twice, and a later malloc fails elsewhere.
    Works need not run side by side for this: a work counts as done before its name is written. The names of all other
    collectives in use fit into the string itself.
    """
    (placement,) = tensor.placements
    local, mesh = tensor.to_local(), tensor.device_mesh
    if placement.is_replicate():
        return local.clone()
    assert placement.is_shard(0), placement
    rows = -(-tensor.shape[0] // mesh.size())  # of each rank; the last ranks have fewer or none
    padded = local.new_zeros(rows, *tensor.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(mesh.size())]
    dist.all_gather(parts, padded, group=mesh.get_group())
    return torch.cat(parts)[: tensor.shape[0]]
