"""Gradients of parameters that share one collective, and this rank's shard of their weights and moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...fp8.number_formats import DTYPES
from ...local_parameter import Replicas
from ..config import OptimConfig
from ..groups import Groups
from .collectives import Collective, begin_all_gather, begin_reduce_scatter
from .shards import Plan


class Bucket:
    """Parameters of one plan: their sums of gradients, and the shard of the state that this rank owns."""

    def __init__(self, plan: Plan, groups: Groups, config: OptimConfig) -> None:
        self.plan = plan
        self.mesh = groups.replicas(plan.replicas, plan.holders)
        self.group = self.mesh.get_group()
        self.rank = self.mesh.get_local_rank()
        self._meter = groups.meter.group(self.group)
        parameter = plan.slots[0].local.parameter
        self.dtype, device = parameter.dtype, parameter.device
        self.gradient = torch.zeros(plan.numel, dtype=torch.float32, device=device)
        self.master = torch.zeros(plan.shard_numel, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(plan.shard_numel, dtype=DTYPES[config.moments], device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        # With a single owner the shard is the bucket; otherwise the reduction makes it, when activations are gone.
        self.shard_gradient = self.gradient
        self._format = DTYPES[config.reduce]
        self._left: list[int | None] = [None] * len(plan.slots)
        self._waited_for = len(plan.slots)
        self._reduced = False
        self._reducing: Collective | None = None
        self._gathering: Collective | None = None

    # Gradients

    def begin(self, expected: Mapping[nn.Parameter, int]) -> None:
        """Clear the gradients; see `ShardedOptimizer.begin_step`."""
        self.finish_reduce()  # of a step that ended in an error
        self.gradient.zero_()
        self.shard_gradient = self.gradient
        self._left = [expected.get(slot.local.parameter) for slot in self.plan.slots]
        self._waited_for = sum(left != 0 for left in self._left)
        self._reduced = False

    @property
    def final(self) -> bool:
        """Whether each of the parameters has had all announced gradients."""
        return not self._waited_for

    def count(self, index: int) -> None:
        """Count another gradient of the parameter in slot `index`."""
        left = self._left[index]
        if self._reduced or left == 0 or self._gathering is not None:
            self._refuse(index)
        if left is not None:
            self._left[index] = left - 1
            self._waited_for -= left == 1

    def _refuse(self, index: int) -> None:
        name = self.plan.slots[index].local.names[0]
        assert self._gathering is None, f"{name} was used before its new weights had arrived"
        assert not self._reduced, f"{name} got a gradient after its gradients were reduced"
        raise AssertionError(f"{name} got a gradient more than announced for this step")

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copy of the gradients that is sent; 0 if they are sent as they lie."""
        if self.plan.ranks == 1 or (self.plan.in_shard_order and self._format == self.gradient.dtype):
            return 0
        return self.plan.ranks * self.plan.shard_numel * self._format.itemsize

    @property
    def reduced(self) -> bool:
        """Whether no reduction is under way, or one that `finish_reduce` need not wait for."""
        return self._reducing is None or self._reducing.done

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Start to sum over the replicas; no gradient may be added afterwards."""
        self._reduced = True
        if self.plan.ranks == 1:
            return
        if self.packed_bytes:
            pieces = self.gradient.new_empty(self.plan.ranks, self.plan.shard_numel, dtype=self._format)
            self.plan.to_shards(self.gradient, pieces)
        else:
            pieces = self.gradient.view(self.plan.ranks, -1)
        self.shard_gradient = torch.empty_like(self.master)
        self._reducing = begin_reduce_scatter(pieces, self.shard_gradient, self.group, self._meter)

    @torch.no_grad()
    def finish_reduce(self) -> None:
        reducing, self._reducing = self._reducing, None
        if reducing is not None:
            reducing.wait()

    # Weights

    @torch.no_grad()
    def start_gather(self, weights: Tensor | None = None) -> bool:
        """Start to send every replica the master weights, or `weights` for this rank's rows, in the parameters' format.

        Returns whether `finish_gather` has yet to write the parameters; until then this rank's rows may not change.
        """
        assert self._gathering is None, "the last weights have not arrived yet"
        shard = (self.master if weights is None else weights).to(self.master.device, self.dtype)
        if self.plan.ranks == 1:
            self.plan.from_shards(shard.unsqueeze(0))
        else:
            self._gathering = begin_all_gather(shard, self.group, self._meter)
        return self._gathering is not None

    @property
    def arrived(self) -> bool:
        """Whether weights were requested and `finish_gather` need not wait for them."""
        return self._gathering is not None and self._gathering.done

    @torch.no_grad()
    def invalidate(self) -> None:
        """Make the parameters NaN, so that a read before `finish_gather` cannot silently use old weights."""
        for slot in self.plan.slots:
            slot.local.parameter.detach().fill_(torch.nan)

    @torch.no_grad()
    def finish_gather(self) -> None:
        """Wait for the weights that `start_gather` requested, and write the parameters."""
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            self.plan.from_shards(gathering.wait())

    # State

    def views(self, flat: Tensor) -> Iterator[tuple[str, DTensor]]:
        """DTensors of a sharded quantity by global name; their local parts lie in `flat`."""
        mesh = self.mesh
        if flat.device.type != mesh.device_type:
            # On the GPUs' mesh a DTensor of CPU memory would be a copy on the GPU.
            mesh = DeviceMesh.from_group(self.group, flat.device.type, mesh_dim_names=mesh.mesh_dim_names)
        for slot in self.plan.slots:
            shape = torch.Size(slot.local.shape)
            stride = (slot.columns, 1)[-len(shape) :]
            owned = len(slot.owned(self.rank))
            for name, rows in zip(slot.local.names, slot.in_shard(flat), strict=True):
                local = rows[:owned].view(owned, *shape[1:])
                yield name, DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def check_agreement(plans: Sequence[Plan], groups: Groups) -> None:
    """Assert that replicas plan the same buckets in the same order: others would be summed without an error.

    Every rank compares its plan in each of its groups, also where it has no parameter, in an order that all share.
    A dry run's groups have no other ranks to ask.
    """
    if dist.get_backend(groups.world) == "fake":
        return
    own = (groups.coordinates.pp,)
    kinds: list[Replicas] = ["dp", "edp"]
    for holders in sorted({own, *(held for _, held in groups.shared)}):
        for kind in kinds:
            group = groups.replicas(kind, holders).get_group()
            planned = [
                (slot.local.names, slot.local.shape, plan.decayed, index)
                for plan in plans
                if (plan.replicas, plan.holders) == (kind, holders)
                for index, slot in enumerate(plan.slots)
            ]
            plan_of_rank: list[Any] = [None] * group.size()
            dist.all_gather_object(plan_of_rank, planned, group=group)
            for rank, other in zip(dist.get_process_group_ranks(group), plan_of_rank, strict=True):
                for here, there in zip_longest(planned, other):
                    assert here == there, f"{kind} of pipeline ranks {holders}: here {here}, on rank {rank} {there}"
