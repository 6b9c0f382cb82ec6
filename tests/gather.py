"""Whole tensors from their shards, for tests that compare them with a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(tensor: DTensor) -> Tensor:
    """A copy of the whole tensor; every rank of its mesh, which has one dimension, calls this.

    Not `DTensor.full_tensor`: on gloo it kills a process now and then. It gathers by torch's functional collectives,
    and gloo calls each such work ALLGATHER_COALESCED. A thread of gloo that has ended a work writes its name into a
    string of the group, without a lock (`ProcessGroupGloo::runLoop` of torch 2.13), and a group has two such threads.
    A name of more than 15 letters lies on the heap, so that two of them at once free it twice; some malloc later fails,
    far from here. It takes no works side by side: a work counts as done before its name is written. All other
    collectives in use have names that fit into the string itself.
    """
    (placement,) = tensor.placements
    local, mesh = tensor.to_local(), tensor.device_mesh
    if placement.is_replicate():
        return local.clone()
    assert placement.is_shard(0), placement
    rows = -(-tensor.shape[0] // mesh.size())  # of each rank but the last ones, which have fewer or none
    padded = local.new_zeros(rows, *tensor.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(mesh.size())]
    dist.all_gather(parts, padded, group=mesh.get_group())
    return torch.cat(parts)[: tensor.shape[0]]
