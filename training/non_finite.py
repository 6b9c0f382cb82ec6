"""Where a number stopped being finite: rank, layer and tensor.

Looking at every tensor of every step would cost more than it is worth, and the loss or the gradient norm shows the
damage in the same step anyhow. So that step, which changed no weight, is run again with an eye on every module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.loader import Batch
from ..parallel.schedule.actions import Action, Overlap

if TYPE_CHECKING:
    from ..model.transformer import Weights
    from .build import Model
    from .trainer import Trainer


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the message names where it began. No weight was changed.

    Every rank raises it. `elsewhere` is True where another rank is to blame, so that the launcher reports that one.
    """

    def __init__(self, step: int, where: str, elsewhere: bool = False) -> None:
        super().__init__(f"step {step} is not finite: {where}; no weight was changed by this step")
        self.elsewhere = elsewhere


class Finding(NamedTuple):
    """One non-finite tensor. Findings compare by when they happened: the least is the cause of the others."""

    micro_batch: int
    backward: bool
    stage: int
    """Its place in the micro-batch's way: counted down in the backward."""
    position: int
    rank: int
    what: str


@torch.no_grad()
def explain_non_finite(trainer: Trainer, micro_batches: list[Batch], weights: Weights) -> NonFiniteError:
    """Find the first non-finite tensor on any rank. Every rank calls it with its own micro-batches of the step."""
    step = trainer.progress.step + 1
    # All ranks look at their weights before any runs the step again, for that takes all of them.
    found = _gather(trainer, _first_bad_parameter(trainer))
    if not found:
        found = _gather(trainer, _replay(trainer, micro_batches, weights))
    if not found:
        again = "running it again was finite, so the fault is not in data or weights: suspect memory, device or network"
        return NonFiniteError(step, again)
    first = min(found)
    return NonFiniteError(step, f"rank {first.rank}, {first.what}", elsewhere=first.rank != trainer.groups.rank)


def _gather(trainer: Trainer, mine: Finding | None) -> list[Finding]:
    """What the ranks have found, on every rank."""
    everyone: list[Any] = [None] * trainer.groups.layout.world_size
    dist.all_gather_object(everyone, mine, group=trainer.groups.world)
    return [finding for finding in everyone if finding is not None]


def _first_bad_parameter(trainer: Trainer) -> Finding | None:
    for position, (name, tensor) in enumerate(_weights(trainer.model)):
        if (bad := _describe(tensor)) is not None:
            return Finding(-1, False, 0, position, trainer.groups.rank, f"weight {name}: {bad}")
    return None


def _weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    for item in model.placed():
        yield from zip(item.names, item.tensors(), strict=True)
    for name, bias, _ in model.biases():
        yield name, bias


def _replay(trainer: Trainer, micro_batches: list[Batch], weights: Weights) -> Finding | None:
    """Run the step's micro-batches again, watching each module's inputs, outputs and their gradients."""
    watch = _Watch(trainer.groups.rank, trainer.model.schedule.num_stages)
    handles = []
    for name, module in trainer.model.modules():
        handles += watch.follow(name, module)
    trainer.executor.watch = watch
    try:
        # Starts from gradients of zero, or a fault that does not come again would be found in its traces.
        with torch.enable_grad():
            trainer.forward_backward(micro_batches, weights)
        trainer.optimizer.reduce_gradients()  # which has begun with the last backward
    finally:
        trainer.executor.watch = None
        for handle in handles:
            handle.remove()
    if watch.first is None:
        for position, (name, gradient) in enumerate(trainer.optimizer.gradients().items()):
            if (bad := _describe(gradient)) is not None:
                what = f"gradient of {name}: {bad}"
                return Finding(len(micro_batches), True, 0, position, trainer.groups.rank, what)
    return watch.first


class _Watch:
    """Hooks that remember the non-finite tensor that came first on its micro-batch's way.

    Ranks of one stage run the same modules in the same order, so positions compare.
    """

    def __init__(self, rank: int, num_stages: int) -> None:
        self.rank = rank
        self.num_stages = num_stages
        self.first: Finding | None = None
        self._forward = self._backward = Action("F", 0, 0)
        self._position = 0
        self._recomputing = False

    def begin(self, action: Action | Overlap) -> None:
        """What is seen from now on belongs to this action: to a pair's forward or backward, whichever it is."""
        self._forward, self._backward = action if isinstance(action, Overlap) else (action, action)

    def backward(self, running: bool) -> None:
        """What a backward recomputes of its forward has been looked at before."""
        self._recomputing = running

    def follow(self, name: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda _, given: self._look(f"input of {name}", given)),
            module.register_forward_hook(lambda _, given, made: self._look(f"output of {name}", made)),
        ]

    def _look(self, what: str, value: Any) -> None:
        if self._recomputing:
            return
        for tensor in _tensors(value):
            self._position += 1
            self._note(False, what, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._look_back(f"gradient of the {what}", grad))

    def _look_back(self, what: str, grad: Tensor) -> None:
        self._position += 1
        self._note(True, what, grad)

    def _note(self, backward: bool, what: str, tensor: Tensor) -> None:
        if (bad := _describe(tensor)) is None:
            return
        action = self._backward if backward else self._forward
        direction = "backward" if backward else "forward"
        text = f"micro-batch {action.microbatch}, {direction}, {what}: {bad}"
        way = self.num_stages - action.stage if backward else action.stage
        found = Finding(action.microbatch, backward, way, self._position, self.rank, text)
        self.first = found if self.first is None else min(self.first, found)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _describe(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.itemsize == 1:  # a code of eight bits, seen before it was one
        return None
    bad = ~tensor.detach().isfinite()
    count = int(bad.sum())
    if count == 0:
        return None
    kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
    return f"{count} of {tensor.numel()} values, {kind}, shape {list(tensor.shape)}"
