"""The sharded optimizer (ZeRO-1): each rank keeps master weights and moments of its rows only.

Gradients of all micro-batches are added up in FP32. A step sums them over the replicas by reduce-scatter, which gives
each rank the rows that it owns. The rank updates these rows and gathers the new weights of the others. Both collectives
run bucket by bucket: the reductions begin during the last backward, and the weights may still arrive during the next
forward.

The ranks of a bucket follow from its parameters' `replicas` and `holders` alone, also if several pipeline ranks hold
the parameters. Every row of every parameter has exactly one owner in the grid. The global gradient norm is therefore a
plain sum over all ranks, and a second copy of a stage costs no second optimizer state.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...local_parameter import LocalParameter
from ...weight_gradients import GradientSum, attach_sum
from ..config import OptimConfig
from ..groups import Groups
from .adamw import Update, adamw
from .bucket import Bucket, check_agreement
from .ema import Ema
from .shards import plan_buckets

PACKED_BYTES = 2 * 2**30
"""Most bytes of packed gradients under way at a time: four buckets of an expert projection of V3. All of them would be
a second copy of a rank's gradients."""


class ShardedOptimizer:
    """AdamW over `parameters`, its state sharded over each parameter's replicas."""

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        groups: Groups,
        config: OptimConfig,
        update: Callable[..., None] = adamw,
    ) -> None:
        """Plan the buckets of `parameters`, this rank's in the model's order; every rank of the grid must take part.

        `update` is `adamw` or an equivalent for this machine's devices.
        """
        self.config = config
        self.groups = groups
        self._update = update

        def ranks(local: LocalParameter) -> int:
            return groups.replicas(local.replicas, local.holders).size()

        plans = plan_buckets(parameters, ranks, int(config.bucket_mb * 2**20 / 4))
        check_agreement(plans, groups)
        self._buckets = [Bucket(plan, groups, config) for plan in plans]
        masters = [bucket.master for bucket in self._buckets]
        self.ema = None if config.ema_decay is None else Ema(masters, config.ema_decay)
        """The moving average of the master weights, if the configuration has one."""
        self._averaged = False
        self._to_reduce: deque[Bucket] = deque(reversed(self._buckets))
        self._reducing: deque[Bucket] = deque()
        self._arriving: set[int] = set()
        numbered = [(b, s, slot) for b, bucket in enumerate(self._buckets) for s, slot in enumerate(bucket.plan.slots)]
        self._slots = {slot.local.parameter: (b, s) for b, s, slot in numbered}
        self._sums = {parameter: self._sum(parameter, *slot) for parameter, slot in self._slots.items()}
        self._follow_gradients()
        self.num_buckets = len(self._buckets)
        self.steps = 0
        self.launched_early = 0
        """Buckets of this step whose reduction started during backward, before `reduce_gradients`."""

    @torch.no_grad()
    def initialise(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set master weights and parameters to `value(name, shape)`, FP32, by global name; restart a moving average."""
        self.finish_gathers()
        if self.ema is not None:
            self.ema.finish()
        for bucket in self._buckets:
            for slot in bucket.plan.slots:
                rows = slot.owned(bucket.rank)
                for name, target in zip(slot.local.names, slot.in_shard(bucket.master), strict=True):
                    whole = value(name, slot.local.shape).view(slot.rows, slot.columns)
                    target[: len(rows)] = whole[rows.start : rows.stop]
        if self.ema is not None:
            self.ema.restart(updates=0)
        self.publish()

    def begin_step(self, expected: Mapping[nn.Parameter, int] | None = None) -> None:
        """Clear the gradients of the last step, and let this step's reductions overlap its backward.

        `expected` is the number of gradients that each parameter will get in this step: one for each backward pass that
        reaches the parameter, however often the graph uses it. The reduction of a bucket starts during backward, once
        all its parameters have all their gradients. Without a count a parameter is final at `reduce_gradients`. Counts
        may differ between replicas. More gradients than announced are a bug, fewer are not: experts may get no tokens.

        Replicas reach their last backwards in different orders (mirrored DualPipe ranks in opposite ones), but must
        call their collectives in the same order. Buckets therefore start in one fixed order, and each waits for the
        earlier ones: from the model's end to its beginning, as backward runs, by each bucket's first parameter. All
        groups share this order, because NCCL needs one order for the collectives of overlapping groups.
        """
        expected = expected or {}
        assert not self._averaged, "training would continue from the average"
        assert expected.keys() <= self._slots.keys(), "a parameter is announced that this optimizer does not hold"
        for bucket in self._buckets:
            bucket.begin(expected)
        self._to_reduce = deque(reversed(self._buckets))
        self._reducing.clear()
        self.launched_early = 0

    def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
        """Buffer of this rank's summed gradients of `parameter`, FP32, in its shape.

        A layer may add to the buffer between `begin_step` and `reduce_gradients`, and then calls `arrived`.
        """
        return self._sums[parameter].buffer

    def arrived(self, parameter: nn.Parameter) -> None:
        """Count a gradient of `parameter` that a layer has added to its buffer."""
        self._sums[parameter].arrived()

    def gradients(self) -> dict[str, Tensor]:
        """Accumulated, unreduced gradients of this rank by global name: views `[N, C]`, FP32."""
        return {
            name: rows
            for bucket in self._buckets
            for slot in bucket.plan.slots
            for name, rows in zip(slot.local.names, slot.in_bucket(bucket.gradient), strict=True)
        }

    def reduced_gradients(self) -> dict[str, DTensor]:
        """The summed gradients by global name, after `reduce_gradients`."""
        return dict(self._named("shard_gradient"))

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Sum gradients over the replicas; returns the norm over every parameter of the model, each counted once."""
        while self._to_reduce:
            while not self._has_room():  # every rank is here by now, or on its way: nobody waits for this one
                self._reducing.popleft().finish_reduce()
            self._start_reduce()
        self.finish_gathers()  # of parameters that no micro-batch has used
        for bucket in self._buckets:
            bucket.finish_reduce()
        parts = [torch.linalg.vector_norm(bucket.shard_gradient, dtype=torch.float64) for bucket in self._buckets]
        squares = torch.stack(parts).square().sum()
        self.groups.sum(squares)
        return float(squares.sqrt())

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float, blocking: bool = True) -> None:
        """Clip by the global norm, update the owned rows and publish the new weights.

        With `blocking` False the call returns while the weights are in flight. The caller then calls `wait_for` before
        a forward uses a parameter; until then the parameter is NaN and refuses a gradient. All all-gathers are launched
        here, in the order in which a forward needs the buckets, which all ranks share. Collectives of the next step
        therefore follow the all-gathers on every rank, and waits launch nothing.
        """
        self.finish_gathers()
        if self.ema is not None:
            self.ema.release()
        clip = self.config.clip_norm
        scale = clip / gradient_norm if clip is not None and gradient_norm > clip else 1.0
        self.steps += 1
        now = Update(lr, self.steps, scale)
        for index, bucket in enumerate(self._buckets):
            decay = self.config.weight_decay if bucket.plan.decayed else 0.0
            self._update(
                bucket.master, bucket.shard_gradient, bucket.exp_avg, bucket.exp_avg_sq, self.config, decay, now
            )
            if not blocking and bucket.start_gather():
                bucket.invalidate()
                self._arriving.add(index)
        if self.ema is not None:
            self.ema.update()
        if blocking:
            self.publish()

    def wait_for(self, *parts: nn.Module | nn.Parameter) -> None:
        """Wait until `parts`, parameters and modules of parameters, have the weights of the last step.

        Other weights that have arrived are written too: until then their memory is held beside the parameters'.
        """
        if not self._arriving:
            return
        for index in sorted(self._arriving):
            if not self._buckets[index].arrived:
                break
            self._arrive(index)
        for part in parts:
            for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
                self._arrive(self._slots[parameter][0])

    def finish_gathers(self) -> None:
        """Wait until all parameters have the weights of the last step; for any use of them outside a forward."""
        for index in sorted(self._arriving):
            self._arrive(index)

    @torch.no_grad()
    def publish(self, shards: Sequence[Tensor | None] | None = None) -> None:
        """Refresh the parameters of all replicas from the master weights, or from other `shards` of the buckets."""
        self.finish_gathers()
        for bucket, shard in zip(self._buckets, shards or [None] * len(self._buckets), strict=True):
            bucket.start_gather(shard)
            bucket.finish_gather()  # one at a time: received weights take memory

    def _arrive(self, index: int) -> None:
        if index in self._arriving:
            self._arriving.remove(index)
            self._buckets[index].finish_gather()

    def state(self) -> dict[str, DTensor]:
        """Views of master weights and moments, as `weights.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`.

        The views may be written to until the next step; `publish` then makes the parameters match.
        """
        self.finish_gathers()  # FP32 weights are sent from the masters' own memory
        if self.ema is not None:
            self.ema.finish()
        fields = {"weights": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        return {f"{key}.{name}": tensor for key, field in fields.items() for name, tensor in self._named(field)}

    def averages(self) -> dict[str, DTensor]:
        """Views of the moving average as `ema.NAME`, FP32 in CPU memory; empty without one.

        The views are valid until the next step. On GPUs only a checkpoint can assemble them: their mesh has no
        collectives on CPU memory.
        """
        if self.ema is None:
            return {}
        shards = zip(self._buckets, self.ema.shards(), strict=True)
        return {f"ema.{name}": tensor for bucket, shard in shards for name, tensor in bucket.views(shard)}

    def shards(self, parameter: nn.Parameter) -> list[Tensor]:
        """Views `[G, rows, C]` of this rank's master weights, moments and average, if there is one, of `parameter`.

        The views may be written to between steps; `publish` then makes the parameters match.
        """
        assert not self._averaged, "the parameters are the average"
        self.finish_gathers()
        index, slot = self._slots[parameter]
        bucket = self._buckets[index]
        flats = [bucket.master, bucket.exp_avg, bucket.exp_avg_sq]
        if self.ema is not None:
            flats.append(self.ema.shards()[index])
        return [bucket.plan.slots[slot].in_shard(flat) for flat in flats]

    def rename(self, parameter: nn.Parameter, names: tuple[str, ...]) -> None:
        """Declare that `parameter` now holds the global tensors `names`; gradients of the last step become void."""
        index, slot = self._slots[parameter]
        plan = self._buckets[index].plan
        slots = list(plan.slots)
        slots[slot] = replace(slots[slot], local=replace(slots[slot].local, names=names))
        self._buckets[index].plan = replace(plan, slots=tuple(slots))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the parameters are the moving average; afterwards they are the master weights, bit for bit.

        All ranks enter and leave the context together. An error inside leaves the average in place: the run is about to
        end, and a collective here would wait for ranks that never come.
        """
        assert self.ema is not None, "there is no average: optim.ema_decay is null"
        self.publish(self.ema.shards())
        self._averaged = True
        yield
        self._averaged = False
        self.publish()

    def _sum(self, parameter: nn.Parameter, index: int, slot: int) -> GradientSum:
        """The sum of a parameter's gradients, which counts what arrives."""
        bucket, reference = self._buckets[index], weakref.ref(self)

        def arrived() -> None:
            bucket.count(slot)
            optimizer = reference()
            if optimizer is not None and optimizer._to_reduce and optimizer._to_reduce[0].final:
                optimizer._reduce_final()

        return GradientSum(bucket.plan.slots[slot].in_bucket(bucket.gradient).view(parameter.shape), arrived)

    def _follow_gradients(self) -> None:
        """Take over every gradient of each parameter: those that autograd gives it, and those that a layer adds."""

        def hook(sum_of: weakref.ref[GradientSum], parameter: Tensor) -> None:
            total, gradient = sum_of(), parameter.grad
            if total is not None and gradient is not None:  # None from a layer that adds the gradient itself
                total.add(gradient)
                parameter.grad = None  # the BF16 gradient of one micro-batch is not kept

        for parameter, total in self._sums.items():
            attach_sum(parameter, total)
            # A parameter keeps its hook, and the hook must not keep the optimizer.
            parameter.register_post_accumulate_grad_hook(partial(hook, weakref.ref(total)))

    def _reduce_final(self) -> None:
        """Start the reductions of final buckets that are next in the fixed order, as long as there is room for them.

        Nothing is waited for: another rank may need this one's backward before it can take part.
        """
        while self._reducing and self._reducing[0].reduced:
            self._reducing.popleft().finish_reduce()
        while self._to_reduce and self._to_reduce[0].final and self._has_room():
            self._start_reduce()
            self.launched_early += 1

    def _has_room(self) -> bool:
        """Whether the packed gradients of the next bucket may be under way beside the others."""
        others = sum(bucket.packed_bytes for bucket in self._reducing)
        return not others or others + self._to_reduce[0].packed_bytes <= PACKED_BYTES

    def _start_reduce(self) -> None:
        bucket = self._to_reduce.popleft()
        bucket.start_reduce()
        self._reducing.append(bucket)

    def _named(self, field: str) -> Iterable[tuple[str, DTensor]]:
        for bucket in self._buckets:
            yield from bucket.views(getattr(bucket, field))
