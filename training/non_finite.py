"""Origin of a number that is not finite: rank, layer and tensor.

Checking every tensor in every step would cost too much. The loss or the gradient norm shows the damage in the same
step, before a weight changes. So the step is run again with hooks on every module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel.executor import Watch
from ..parallel.groups import Groups
from ..parallel.schedule.actions import Action, Overlap
from .build import Model

RunAgain = Callable[[Watch], Mapping[str, Tensor]]
"""Function that runs a step again under a watch; returns the sums of the gradients on this rank, by global name."""


class NonFiniteError(RuntimeError):
    """NaN or infinity in a loss or gradient; the message names where it began. No weight was changed.

    Every rank raises it. `elsewhere` is True where it began on another rank, so that the launcher reports that rank.
    """

    def __init__(self, step: int, where: str, elsewhere: bool = False) -> None:
        super().__init__(f"step {step} is not finite: {where}; no weight was changed by this step")
        self.elsewhere = elsewhere


class Finding(NamedTuple):
    """One non-finite tensor. Findings compare by when they happened: the least is the cause of the others."""

    micro_batch: int
    backward: bool
    stage: int
    """Position of the stage in the order of the direction: the last stage comes first in the backward."""
    position: int
    """Number of the tensor among the checked ones, in the order in which they were made."""
    rank: int
    what: str


@torch.no_grad()
def explain_non_finite(step: int, model: Model, groups: Groups, run_again: RunAgain) -> NonFiniteError:
    """Find the first non-finite tensor of `step` on any rank. Every rank calls it, with its own part of the step."""
    # All ranks check their weights first, because running the step again takes all ranks.
    findings = _gather(groups, _first_bad_parameter(model, groups.rank))
    if not findings:
        findings = _gather(groups, _replay(model, groups.rank, run_again))
    if not findings:
        finite = (
            "running it again was finite, so the fault is not in data or weights: suspect memory, device or network"
        )
        return NonFiniteError(step, finite)
    first = min(findings)
    return NonFiniteError(step, f"rank {first.rank}, {first.what}", elsewhere=first.rank != groups.rank)


def _gather(groups: Groups, own: Finding | None) -> list[Finding]:
    """Findings of all ranks, on every rank."""
    of_ranks: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(of_ranks, own, group=groups.world)
    return [finding for finding in of_ranks if finding is not None]


def _first_bad_parameter(model: Model, rank: int) -> Finding | None:
    for position, (name, tensor) in enumerate(_weights(model)):
        if (bad := _describe(tensor)) is not None:
            return Finding(-1, False, 0, position, rank, f"weight {name}: {bad}")
    return None


def _weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    for item in model.placed():
        yield from zip(item.names, item.tensors(), strict=True)
    for name, bias, _ in model.biases():
        yield name, bias


def _replay(model: Model, rank: int, run_again: RunAgain) -> Finding | None:
    """Run the step again and check each module's inputs, outputs and their gradients."""
    watch = _ModuleWatch(rank, model.schedule.num_stages)
    handles = []
    for name, module in model.modules():
        handles += watch.follow(name, module)
    try:
        # The sums start from zero: NaNs left by the first run would hide that a fault does not repeat.
        with torch.enable_grad():
            gradients = run_again(watch)
    finally:
        for handle in handles:
            handle.remove()
    if watch.first is None:
        for position, (name, gradient) in enumerate(gradients.items()):
            if (bad := _describe(gradient)) is not None:  # after the modules' tensors of every micro-batch
                return Finding(sys.maxsize, True, 0, position, rank, f"gradient of {name}: {bad}")
    return watch.first


class _ModuleWatch:
    """Hooks that keep the first non-finite tensor, in the order of `Finding`.

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
        """Attribute the tensors that follow to this action; in a pair, to its forward or to its backward."""
        self._forward, self._backward = action if isinstance(action, Overlap) else (action, action)

    def end(self, action: Action | Overlap) -> None:
        """Do nothing: tensors are attributed when the next action begins."""

    def phase(self, side: str, name: str | None) -> None:
        """Skip the tensors that a backward recomputes: the forward has checked them."""
        self._recomputing = side == "B" and name is not None

    def follow(self, name: str, module: nn.Module) -> list[Any]:
        """Hook into a module; return the handles of the hooks."""
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
    if not tensor.is_floating_point() or tensor.itemsize == 1:  # eight-bit codes: their values were checked before
        return None
    bad = ~tensor.detach().isfinite()
    count = int(bad.sum())
    if count == 0:
        return None
    kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
    return f"{count} of {tensor.numel()} values, {kind}, shape {list(tensor.shape)}"
