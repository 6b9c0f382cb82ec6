"""The sharded optimizer (ZeRO-1): each rank keeps master weights and moments of its rows only.

Gradients of every micro-batch are added up in FP32. A step sums them over the replicas by reduce-scatter, so a rank
receives the rows it owns; updates those; and gathers the new weights of the others. Which ranks take part follows
from the parameter's placement alone, also where several pipeline ranks hold it, and every row of every parameter is
owned exactly once in the whole grid: the global gradient norm is a plain sum over all ranks, with no list of
exceptions, and a second copy of a stage costs no second optimizer state.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..placement import Placed, Replicas
from .adamw import Update, adamw
from .config import OptimConfig
from .ema import Ema
from .groups import Groups
from .shards import Plan, plan_buckets

# As of torch 2.13 these have new names, and the old ones warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Bucket:
    """Gradients, and this rank's shard of the state, of the parameters of one plan."""

    def __init__(self, plan: Plan, groups: Groups, moments: torch.dtype) -> None:
        self.plan = plan
        self.mesh = groups.replicas(plan.replicas, plan.holders)
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
        self._left: list[int | None] = [None] * len(plan.slots)
        self._reduced = False
        self._reducing: tuple[dist.Work, Tensor] | None = None

    def begin(self, expected: Mapping[nn.Parameter, int]) -> None:
        """Forget the gradients; see `ShardedOptimizer.begin_step`."""
        self.finish_reduce()  # of a step that an error ended
        self.gradient.zero_()
        self._left = [expected.get(slot.placed.parameter) for slot in self.plan.slots]
        self._reduced = False

    @property
    def final(self) -> bool:
        """Whether each of the parameters has had as many gradients as were announced."""
        return not any(left is None or left for left in self._left)

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a gradient of the parameter in slot `index`."""
        self.count(index)
        accumulated = self.plan.slots[index].in_bucket(self.gradient)
        accumulated.add_(gradient.view_as(accumulated))

    def count(self, index: int) -> None:
        """One more gradient of the parameter in slot `index`."""
        name, left = self.plan.slots[index].placed.names[0], self._left[index]
        assert not self._reduced, f"{name} got a gradient after its gradients were reduced"
        assert left != 0, f"{name} got a gradient more than was announced for this step"
        if left is not None:
            self._left[index] = left - 1

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Start to sum over the replicas; nothing may be added from here on."""
        self._reduced = True
        if self.plan.ranks == 1:
            return
        by_rank = self.gradient.new_empty(self.plan.ranks, self.plan.shard_numel)
        self.plan.to_shards(self.gradient, by_rank)
        work = _reduce_scatter(self.shard_gradient, by_rank.view(-1), group=self.group, async_op=True)
        assert work is not None
        self._reducing = work, by_rank  # by_rank must live until the work is done

    def finish_reduce(self) -> None:
        if self._reducing is not None:
            self._reducing[0].wait()
            self._reducing = None

    def publish(self, weights: Tensor | None = None) -> None:
        """Give every replica the master weights, or other `weights` of this rank's rows, in the parameters' format."""
        shard = (self.master if weights is None else weights).to(self.master.device, self.dtype)
        if self.plan.ranks == 1:
            self.plan.from_shards(shard.unsqueeze(0))
            return
        gathered = shard.new_empty(self.plan.ranks, self.plan.shard_numel)
        _all_gather(gathered.view(-1), shard, group=self.group)
        self.plan.from_shards(gathered)

    def views(self, flat: Tensor) -> Iterator[tuple[str, DTensor]]:
        """Each global tensor of a sharded quantity by name, as the DTensor whose local part lies in `flat`."""
        mesh = self.mesh
        if flat.device.type != mesh.device_type:
            # On the GPUs' mesh a DTensor of CPU memory would be a copy on the GPU.
            mesh = DeviceMesh.from_group(self.group, flat.device.type, mesh_dim_names=mesh.mesh_dim_names)
        for slot in self.plan.slots:
            shape = torch.Size(slot.placed.shape)
            stride = (slot.columns, 1)[-len(shape) :]
            owned = len(slot.owned(self.rank))
            for name, rows in zip(slot.placed.names, slot.in_shard(flat), strict=True):
                local = rows[:owned].view(owned, *shape[1:])
                yield name, DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


class ShardedOptimizer:
    """AdamW over the parameters of `placed`, its state sharded over each parameter's replicas."""

    def __init__(
        self, placed: Sequence[Placed], groups: Groups, config: OptimConfig, update: Callable[..., None] = adamw
    ) -> None:
        """`placed` are this rank's parameters in the model's order; every rank of the grid makes its optimizer.

        `update` does what `adamw` does, on this machine's devices.
        """
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.config = config
        self.groups = groups
        self._update = update
        plans = plan_buckets(
            placed,
            lambda item: groups.replicas(item.replicas, item.holders).size(),
            int(config.bucket_mb * 2**20 / 4),
        )
        _check_agreement(plans, groups)
        self._buckets = [_Bucket(plan, groups, moments) for plan in plans]
        self.ema = None
        """The moving average of the master weights; None where the configuration asks for none."""
        if config.ema_decay is not None:
            self.ema = Ema([bucket.master for bucket in self._buckets], config.ema_decay)
        self._averaged = False
        self._to_reduce: deque[_Bucket] = deque(reversed(self._buckets))
        self._places = {
            slot.placed.parameter: (b, s)
            for b, bucket in enumerate(self._buckets)
            for s, slot in enumerate(bucket.plan.slots)
        }
        self._follow_gradients()
        self.steps = 0
        self.launched_early = 0
        """Buckets of this step whose reduction was started during backward, that is before `reduce_gradients`."""

    @torch.no_grad()
    def initialise(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set the master weights to `value(name, shape)`, FP32, of each global tensor, and the parameters to match.

        A moving average begins anew.
        """
        if self.ema is not None:
            self.ema.finish()
        for bucket in self._buckets:
            for slot in bucket.plan.slots:
                rows = slot.owned(bucket.rank)
                for name, target in zip(slot.placed.names, slot.in_shard(bucket.master), strict=True):
                    whole = value(name, slot.placed.shape).view(slot.rows, slot.columns)
                    target[: len(rows)] = whole[rows.start : rows.stop]
        if self.ema is not None:
            self.ema.restart(updates=0)
        self.publish()

    def begin_step(self, expected: Mapping[nn.Parameter, int] | None = None) -> None:
        """Forget the gradients of the step before, and let this step's reductions overlap its backward.

        `expected` says how often each parameter will get a gradient in this step: once for each backward pass that
        reaches it, however often it is used in the graph. When all of a bucket have theirs, its reduction starts, in
        the midst of backward. A parameter that is not listed is final only at `reduce_gradients`. The counts may
        differ between replicas. More gradients than announced are a bug, fewer are not: experts may go without tokens.

        Replicas reach their last backwards in different orders (mirrored DualPipe ranks in opposite ones), yet
        must call their collectives in the same. So buckets start in one fixed order, and each waits for those before
        it: from the model's end to its beginning, as backward runs, by each bucket's first parameter. It is one order
        for all groups, because NCCL wants the collectives of overlapping groups in an order that all ranks share.
        """
        expected = expected or {}
        assert not self._averaged, "training would go on from the average"
        assert expected.keys() <= self._places.keys(), "a parameter is announced that this optimizer does not hold"
        for bucket in self._buckets:
            bucket.begin(expected)
        self._to_reduce = deque(reversed(self._buckets))
        self.launched_early = 0

    def zero_gradients(self) -> None:
        """Begin a step in which all reductions wait for `reduce_gradients`."""
        self.begin_step()

    @property
    def num_buckets(self) -> int:
        """Reductions in a step."""
        return len(self._buckets)

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        """Where this rank's gradients of `parameter` are added up, FP32, in its shape: for layers that add to it
        themselves, between `begin_step` and `reduce_gradients`, and tell by `arrived`."""
        bucket, slot = self._places[parameter]
        at = self._buckets[bucket]
        return at.plan.slots[slot].in_bucket(at.gradient).view(parameter.shape)

    def arrived(self, parameter: nn.Parameter) -> None:
        """A layer has added a gradient of `parameter` to its buffer: count it, as of those that autograd passes."""
        bucket, slot = self._places[parameter]
        self._buckets[bucket].count(slot)
        self._reduce_final()

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
        while self._to_reduce:
            self._to_reduce.popleft().start_reduce()
        for bucket in self._buckets:
            bucket.finish_reduce()
        parts = [torch.linalg.vector_norm(bucket.shard_gradient, dtype=torch.float64) for bucket in self._buckets]
        squares = torch.stack(parts).square().sum()
        dist.all_reduce(squares, group=self.groups.world)
        return float(squares.sqrt())

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the global norm, update the owned rows and publish the new weights."""
        if self.ema is not None:
            self.ema.release()
        clip = self.config.clip_norm
        scale = clip / gradient_norm if clip is not None and gradient_norm > clip else 1.0
        self.steps += 1
        now = Update(lr, self.steps, scale)
        for bucket in self._buckets:
            decay = self.config.weight_decay if bucket.plan.decayed else 0.0
            self._update(
                bucket.master, bucket.shard_gradient, bucket.exp_avg, bucket.exp_avg_sq, self.config, decay, now
            )
        if self.ema is not None:
            self.ema.update()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Refresh the parameters of all replicas from the master weights."""
        for bucket in self._buckets:
            bucket.publish()

    def state(self) -> dict[str, DTensor]:
        """Views of master weights and moments, as `weights.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`.

        Until the next step they may be written to; `publish` then makes the parameters match.
        """
        if self.ema is not None:
            self.ema.finish()
        fields = {"weights": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        return {f"{key}.{name}": tensor for key, field in fields.items() for name, tensor in self._named(field)}

    def averages(self) -> dict[str, DTensor]:
        """Views of the moving average as `ema.NAME`, FP32 in CPU memory; empty without one.

        They are good until the next step. On GPUs nothing but a checkpoint can put them together: their mesh has no
        collectives on CPU memory.
        """
        if self.ema is None:
            return {}
        shards = zip(self._buckets, self.ema.shards(), strict=True)
        return {f"ema.{name}": tensor for bucket, shard in shards for name, tensor in bucket.views(shard)}

    def shards(self, parameter: nn.Parameter) -> list[Tensor]:
        """This rank's master weights, moments and average, if there is one, of `parameter`: views `[G, rows, C]`.

        Between steps they may be written to; `publish` then makes the parameters match.
        """
        assert not self._averaged, "the parameters are the average"
        at, slot = self._places[parameter]
        bucket = self._buckets[at]
        flats = [bucket.master, bucket.exp_avg, bucket.exp_avg_sq]
        if self.ema is not None:
            flats.append(self.ema.shards()[at])
        return [bucket.plan.slots[slot].in_shard(flat) for flat in flats]

    def rename(self, parameter: nn.Parameter, names: tuple[str, ...]) -> None:
        """From now on `parameter` holds the global tensors `names`; the gradients of the step before are void."""
        at, index = self._places[parameter]
        plan = self._buckets[at].plan
        slot = plan.slots[index]
        renamed = replace(slot, placed=replace(slot.placed, names=names))
        self._buckets[at].plan = replace(plan, slots=(*plan.slots[:index], renamed, *plan.slots[index + 1 :]))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters are the moving average, after it the master weights again, bit for bit.

        Every rank enters and leaves it together. An error within it leaves the average in place: it is about to end
        the run, and a collective here would wait for ranks that never come.
        """
        assert self.ema is not None, "there is no average: optim.ema_decay is null"
        with torch.no_grad():
            for bucket, shard in zip(self._buckets, self.ema.shards(), strict=True):
                bucket.publish(shard)
        self._averaged = True
        yield
        self._averaged = False
        self.publish()

    def _follow_gradients(self) -> None:
        """Take over each gradient a parameter gets, from a graph or by backward on the parameter itself."""
        this = weakref.ref(self)  # a parameter keeps its hook, which must not keep optimizer and parameters in turn

        def follow(parameter: nn.Parameter, bucket: int, slot: int) -> None:
            def hook(parameter: Tensor) -> None:
                if (optimizer := this()) is not None:
                    optimizer._accumulate(parameter, bucket, slot)

            parameter.register_post_accumulate_grad_hook(hook)

        for parameter, (bucket, slot) in self._places.items():
            follow(parameter, bucket, slot)

    def _accumulate(self, parameter: Tensor, bucket: int, slot: int) -> None:
        if parameter.grad is None:  # a layer that has put its weight gradient off passes none
            return
        self._buckets[bucket].accumulate(slot, parameter.grad)
        parameter.grad = None  # the BF16 gradient of one micro-batch is not kept
        self._reduce_final()

    def _reduce_final(self) -> None:
        """Start what is final, as far as it is next in the fixed order."""
        while self._to_reduce and self._to_reduce[0].final:
            bucket = self._to_reduce.popleft()
            bucket.start_reduce()
            self.launched_early += 1

    def _named(self, field: str) -> Iterable[tuple[str, DTensor]]:
        for bucket in self._buckets:
            yield from bucket.views(getattr(bucket, field))


def _check_agreement(plans: Sequence[Plan], groups: Groups) -> None:
    """See to it that replicas plan the same buckets in the same order: others would be summed without an error.

    Every rank asks each of its groups in an order that all share, also one it has no parameter for.
    """
    own = (groups.coordinates.pp,)
    kinds: list[Replicas] = ["dp", "edp"]
    for holders in sorted({own, *(held for _, held in groups.shared)}):
        for kind in kinds:
            group = groups.replicas(kind, holders).get_group()
            mine = [
                (slot.placed.names, slot.placed.shape, plan.decayed, place)
                for plan in plans
                if (plan.replicas, plan.holders) == (kind, holders)
                for place, slot in enumerate(plan.slots)
            ]
            theirs: list[Any] = [None] * group.size()
            dist.all_gather_object(theirs, mine, group=group)
            for rank, other in zip(dist.get_process_group_ranks(group), theirs, strict=True):
                for ours, its in zip_longest(mine, other):
                    assert ours == its, f"{kind} of pipeline ranks {holders}: here {ours}, on rank {rank} {its}"
