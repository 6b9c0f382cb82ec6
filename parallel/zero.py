"""The sharded optimizer (ZeRO-1): each rank keeps master weights and moments of its rows only.

Gradients of every micro-batch are added up in FP32. A step sums them over the replicas by reduce-scatter, so a rank
receives the rows it owns; updates those; and gathers the new weights of the others. Which ranks take part follows
from the parameter's placement alone, and every row of every parameter is owned exactly once in the whole grid: the
global gradient norm is a plain sum over all ranks, with no list of exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..placement import Placed, Replicas
from .adamw import Update, adamw
from .config import OptimConfig
from .groups import Groups
from .shards import Plan, plan_buckets

# As of torch 2.13 these have new names, and the old ones warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Bucket:
    """Gradients, and this rank's shard of the state, of the parameters of one plan."""

    def __init__(self, plan: Plan, groups: Groups, moments: torch.dtype) -> None:
        self.plan = plan
        self.mesh = groups.replicas(plan.replicas)
        self.group = self.mesh.get_group()
        self.rank = self.mesh.get_local_rank()
        parameter = plan.slots[0].placed.parameter
        self.dtype, device = parameter.dtype, parameter.device
        self.gradient = torch.zeros(plan.numel, dtype=torch.float32, device=device)
        self.master = torch.zeros(plan.shard_numel, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros(plan.shard_numel, dtype=moments, device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        # With a single owner the shard is the bucket; otherwise reduce-scatter fills it.
        alone = plan.ranks == 1
        self.shard_gradient = self.gradient if alone else torch.zeros_like(self.master)
        for slot in plan.slots:
            self._accumulate_into(slot.placed.parameter, slot.in_bucket(self.gradient))

    @staticmethod
    def _accumulate_into(parameter: torch.nn.Parameter, accumulated: Tensor) -> None:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            accumulated.add_(parameter.grad.view_as(accumulated))
            parameter.grad = None  # the BF16 gradient of one micro-batch is not kept

        parameter.register_post_accumulate_grad_hook(hook)

    def start_reduce(self) -> tuple[dist.Work, Tensor] | None:
        if self.plan.ranks == 1:
            return None
        by_rank = self.gradient.new_empty(self.plan.ranks, self.plan.shard_numel)
        self.plan.to_shards(self.gradient, by_rank)
        work = _reduce_scatter(self.shard_gradient, by_rank.view(-1), group=self.group, async_op=True)
        assert work is not None
        return work, by_rank  # by_rank must live until the work is done

    def publish(self) -> None:
        """Give every replica the master weights, rounded to the parameters' format."""
        shard = self.master.to(self.dtype)
        if self.plan.ranks == 1:
            self.plan.from_shards(shard.unsqueeze(0))
            return
        gathered = shard.new_empty(self.plan.ranks, self.plan.shard_numel)
        _all_gather(gathered.view(-1), shard, group=self.group)
        self.plan.from_shards(gathered)

    def views(self, flat: Tensor) -> Iterator[tuple[str, DTensor]]:
        """Each global tensor of a sharded quantity by name, as the DTensor whose local part lies in `flat`."""
        for slot in self.plan.slots:
            shape = torch.Size(slot.placed.shape)
            stride = (slot.columns, 1)[-len(shape) :]
            owned = len(slot.owned(self.rank))
            for name, rows in zip(slot.placed.names, slot.in_shard(flat), strict=True):
                local = rows[:owned].view(owned, *shape[1:])
                yield (
                    name,
                    DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride),
                )


class ShardedOptimizer:
    """AdamW over the parameters of `placed`, its state sharded over each parameter's replicas."""

    def __init__(self, placed: Sequence[Placed], groups: Groups, config: OptimConfig) -> None:
        ranks: dict[Replicas, int] = {"dp": groups.layout.dp, "edp": groups.layout.edp}
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.config = config
        self.groups = groups
        plans = plan_buckets(placed, ranks, int(config.bucket_mb * 2**20 / 4))
        self._buckets = [_Bucket(plan, groups, moments) for plan in plans]
        self.steps = 0

    @torch.no_grad()
    def initialise(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set the master weights to `value(name, shape)`, FP32, of each global tensor, and the parameters to match."""
        for bucket in self._buckets:
            for slot in bucket.plan.slots:
                rows = slot.owned(bucket.rank)
                for name, target in zip(slot.placed.names, slot.in_shard(bucket.master), strict=True):
                    whole = value(name, slot.placed.shape).view(slot.rows, slot.columns)
                    target[: len(rows)] = whole[rows.start : rows.stop]
        self.publish()

    def zero_gradients(self) -> None:
        for bucket in self._buckets:
            bucket.gradient.zero_()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's accumulated, unreduced gradients by global name: views `[N, C]`, FP32."""
        return {
            name: rows
            for bucket in self._buckets
            for slot in bucket.plan.slots
            for name, rows in zip(slot.placed.names, slot.in_bucket(bucket.gradient), strict=True)
        }

    def reduced_gradients(self) -> dict[str, DTensor]:
        """The summed gradients by global name, after `reduce_gradients`."""
        return dict(self._named("shard_gradient"))

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Sum gradients over the replicas; returns the norm over every parameter of the model, each counted once."""
        for started in [bucket.start_reduce() for bucket in self._buckets]:
            if started is not None:
                started[0].wait()
        parts = [torch.linalg.vector_norm(bucket.shard_gradient, dtype=torch.float64) for bucket in self._buckets]
        squares = torch.stack(parts).square().sum()
        dist.all_reduce(squares, group=self.groups.world)
        return float(squares.sqrt())

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the global norm, update the owned rows and publish the new weights."""
        clip = self.config.clip_norm
        scale = clip / gradient_norm if clip is not None and gradient_norm > clip else 1.0
        self.steps += 1
        now = Update(lr, self.steps, scale)
        for bucket in self._buckets:
            decay = self.config.weight_decay if bucket.plan.decayed else 0.0
            adamw(bucket.master, bucket.shard_gradient, bucket.exp_avg, bucket.exp_avg_sq, self.config, decay, now)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Refresh the parameters of all replicas from the master weights."""
        for bucket in self._buckets:
            bucket.publish()

    def state(self) -> dict[str, DTensor]:
        """Views of master weights and moments, as `weights.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        fields = {"weights": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        return {f"{key}.{name}": tensor for key, field in fields.items() for name, tensor in self._named(field)}

    def _named(self, field: str) -> Iterable[tuple[str, DTensor]]:
        for bucket in self._buckets:
            yield from bucket.views(getattr(bucket, field))
