"""Gradients of one step at given weights, in any precision and without an optimizer, and the deviation of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs.config import Config
from ..data.loader import Batch, Loader
from ..fp8.recipe import Observer
from ..model.router import Router
from ..model.transformer import LossWeights, MicroBatch
from ..parallel.executor import Program
from ..parallel.groups import Groups
from ..plan.pipeline import make_schedule
from ..plan.steps import steps_from
from ..training.build import build_executor, build_model
from ..training.objective import dropping_of, loss_weights
from ..training.parameter_classes import PARAMETERS, parameter_class
from ..training.trainer import Trainer
from .result import Deviation


@dataclass(frozen=True)
class Point:
    """Weights of a run and the batch of its next step: the point at which gradients are taken."""

    state: Mapping[str, Tensor]
    """FP32 weights, and the routers' biases, by global name."""
    batches: Sequence[Batch]
    weights: LossWeights

    @classmethod
    def of(cls, trainer: Trainer) -> Point:
        """The present point of a trainer on a single rank. Weights are copied, so that the trainer may continue."""
        config, at = trainer.config, trainer.progress
        state = {
            name.removeprefix("weights."): tensor.to_local().clone()
            for name, tensor in trainer.optimizer.state().items()
            if name.startswith("weights.")
        }
        state |= {name: bias.clone() for name, bias, _ in trainer.model.biases()}
        progress, sequences = next(steps_from(at, config.batch))
        with Loader(
            trainer.data.train,
            [(progress.sequences, sequences)],
            dp_rank=0,
            dp_size=1,
            micro_sequences=config.batch.micro_sequences,
        ) as loader:
            batches = next(loader)
        return cls(state, batches, loss_weights(config, progress, sequences))


Choices = Mapping[int, Sequence[Tensor]]
"""For each MoE layer the experts `[T, K]` of its tokens, one tensor each time its router ran."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of all parameters, and the experts that the tokens went to."""

    tensors: Mapping[str, Tensor]
    """FP32, by global name."""
    choices: Choices


class Probe:
    """The model of a configuration on this process alone, for gradients at any point."""

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = build_model(config, groups, device)
        self._executor = build_executor(config, self.model, groups, device)
        self._placed = self.model.placed()
        self._sums = {item.parameter: torch.zeros_like(item.parameter, dtype=torch.float32) for item in self._placed}
        for item in self._placed:
            item.parameter.register_post_accumulate_grad_hook(self._accumulate)

    def gradients(self, point: Point, observer: Observer | None = None, choices: Choices | None = None) -> Gradients:
        """Gradients of one step at `point`; `observer` is called with every quantisation.

        With `choices` tokens go to these experts, whatever their scores.
        """
        self._put(point.state)
        for total in self._sums.values():
            total.zero_()
        batches = [
            MicroBatch(
                batch.tokens.to(self.device),
                batch.valid.to(self.device),
                point.weights,
                dropping=dropping_of(self.config, batch, self.device),
            )
            for batch in point.batches
        ]
        self.model.recipe.monitor.observer = observer
        fixed = choices or {}
        records = {layer: _SelectionRecord(router, fixed.get(layer)) for layer, router in self.model.routers()}
        for layer, router in self.model.routers():
            router.selection = records[layer]
        try:
            self._executor.train(Program.of(make_schedule(self.config, len(batches)), 0), batches)
        finally:
            self.model.recipe.monitor.observer = None
            for _, router in self.model.routers():
                router.selection = None
        tensors = {
            name: tensor.clone()
            for item in self._placed
            for name, tensor in zip(item.names, item.tensors(self._sums[item.parameter]), strict=True)
        }
        return Gradients(tensors, {layer: record.made for layer, record in records.items()})

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        for chunk in self.model.chunks.values():
            chunk.train()
        for item in self._placed:
            # Writing to `.data` would not raise the version by which a layer detects that its quantised copies are old.
            views = item.tensors(item.parameter.detach())
            for name, view in zip(item.names, views, strict=True):
                view.copy_(state[name].view_as(view))
        for name, bias, _ in self.model.biases():
            bias.copy_(state[name])

    def _accumulate(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # None where a layer defers its weight gradient
            self._sums[parameter].add_(parameter.grad)  # type: ignore[index]
            parameter.grad = None


class _SelectionRecord:
    """Record of a router's selections: its own, or those of an earlier record in the same order."""

    def __init__(self, router: Router, given: Sequence[Tensor] | None) -> None:
        self.made: list[Tensor] = []
        self._router, self._given = router, given

    def __call__(self, scores: Tensor) -> Tensor:
        """Select experts `[T, K]` for the tokens with these scores `[T, E]`."""
        self.made.append(self._router.select(scores) if self._given is None else self._given[len(self.made)])
        return self.made[-1]


def moved_share(choices: Choices, reference: Choices) -> float:
    """Share of the choices of experts that are not among the reference's; 0 for a model without experts."""
    moved = total = 0
    for layer, chosen in choices.items():
        for here, there in zip(chosen, reference[layer], strict=True):
            same = (here.unsqueeze(2) == there.unsqueeze(1)).any(2)
            moved += int((~same).sum())
            total += same.numel()
    return moved / total if total else 0.0


@dataclass
class DeviationSums:
    """Sums over the elements of gradients and of a reference."""

    squares: float = 0.0
    """Squares of the reference."""
    own_squares: float = 0.0
    """Squares of the gradients."""
    product: float = 0.0
    squared_error: float = 0.0

    def add(self, gradient: Tensor, reference: Tensor) -> None:
        own, exact = gradient.double(), reference.double()
        self.squares += float(exact.square().sum())
        self.own_squares += float(own.square().sum())
        self.product += float((own * exact).sum())
        self.squared_error += float((own - exact).square().sum())

    @property
    def error(self) -> float:
        """||g - reference|| / ||reference||."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.squares * self.own_squares)
        return self.product / norms if norms else 1.0

    def deviation(self) -> Deviation:
        return Deviation(error=self.error, cosine=self.cosine)


def compare(gradients: Gradients, reference: Gradients) -> dict[str, DeviationSums]:
    """Deviations by class of parameter, in the order of PARAMETERS, and of `all` together."""
    sums = {name: DeviationSums() for name, _ in PARAMETERS} | {"all": DeviationSums()}
    for name, gradient in gradients.tensors.items():
        for into in (parameter_class(name), "all"):
            sums[into].add(gradient, reference.tensors[name])
    return {name: each for name, each in sums.items() if each.squares}
