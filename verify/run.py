"""Values of a training step on one rank, and the single process that grids are compared with.

L MoE layers, E experts, K top-k, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..configs.config import Config
from ..data.loader import Loader
from ..fp8.number_formats import DTYPES
from ..model.kernels import Kernels
from ..model.naming import initialise, local_parameters
from ..model.router import Router
from ..model.transformer import Transformer
from ..parallel.groups import Groups
from ..plan.steps import Progress, steps_from
from ..training.dispatch import make_dispatcher
from ..training.objective import dropping_of
from ..training.trainer import Trainer
from .text import Text

NUMBERS = ("loss", "loss_mtp", "loss_balance", "loss_device", "loss_communication", "grad_norm")

State = dict[str, Tensor]
"""Whole tensors by global name: `weights.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and the biases as `NAME`."""


@dataclass
class OwnedRows:
    """The consecutive rows of a global tensor that a rank owns."""

    start: int
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    values: Tensor

    @classmethod
    def of(cls, tensor: DTensor) -> OwnedRows:
        return cls(_first_row(tensor), tuple(tensor.shape), tensor.to_local().detach().clone())


@dataclass
class RankStep:
    """Values of one rank at the end of a step."""

    rank: int
    numbers: dict[str, float]
    gradients: dict[str, OwnedRows]
    state: dict[str, OwnedRows]
    """Master weights and moments."""
    copies: dict[str, Tensor]
    """Global tensors in this rank's parameters, in the format of the recipe."""
    biases: dict[str, Tensor]
    counts: Tensor
    """`[L, E]` tokens that this rank's routers sent to each expert."""


@dataclass
class ChoiceGaps:
    """Gaps between the scores of the last chosen and the first not chosen, in a step."""

    gaps: dict[int, list[Tensor]] = field(default_factory=dict)
    """`[3, T]` by MoE layer, one tensor per micro-batch, see `choice_gaps`."""

    def closest(self) -> float:
        """Least gap of all; infinite for a model without experts."""
        return min((float(gap.min()) for gaps in self.gaps.values() for gap in gaps), default=float("inf"))

    def near(self, layer: int, bound: float, top_k: int) -> int:
        """Number of a layer's (token, expert) pairs that can change, because choices have gaps of `bound` or less.

        A choice of experts changes one pair, a choice of groups all K pairs of its token.
        """
        groups, experts = sum(
            ((gap[:2] <= bound).sum(1) for gap in self.gaps.get(layer, [])), torch.zeros(2, dtype=torch.int64)
        )
        return int(groups) * top_k + int(experts)

    def near_balance(self, bound: float) -> int:
        """Number of such choices of all layers that only the balance loss counts. These choices move no token."""
        return sum(int((gap[2] <= bound).sum()) for gaps in self.gaps.values() for gap in gaps)


@dataclass
class ReferenceStep:
    """A step of the single process: the state before, and the values after."""

    before: State
    values: RankStep
    choices: ChoiceGaps


class ObservedTrainer:
    """A trainer with hooks on its routers."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def step(self, choices: ChoiceGaps | None = None) -> RankStep:
        """Train a step; gaps are added to `choices` if given."""
        trainer = self.trainer
        with _observed_routers(trainer, choices) as counts:
            metrics = trainer.step()
        optimizer = trainer.optimizer
        optimizer.finish_gathers()
        placed = trainer.model.placed()
        return RankStep(
            rank=trainer.groups.rank,
            numbers={
                name: value
                for name in NUMBERS
                if (value := getattr(metrics, name)) is not None and name not in _unused(trainer.config)
            },
            gradients={name: OwnedRows.of(tensor) for name, tensor in optimizer.reduced_gradients().items()},
            state={name: OwnedRows.of(tensor) for name, tensor in optimizer.state().items()},
            copies={n: t.clone() for item in placed for n, t in zip(item.names, item.tensors(), strict=True)},
            biases={name: bias.clone() for name, bias, _ in trainer.model.biases()},
            counts=counts,
        )

    def state(self) -> State:
        """A copy of the state that the next step begins with; for a single process, which has whole tensors."""
        biases = {name: bias.clone() for name, bias, _ in self.trainer.model.biases()}
        return {name: t.to_local().clone() for name, t in self.trainer.optimizer.state().items()} | biases

    def begin_with(self, state: State) -> None:
        """Continue from this rank's part of `state`."""
        for name, tensor in self.trainer.optimizer.state().items():
            local, start = tensor.to_local(), _first_row(tensor)
            local.copy_(state[name][start : start + local.shape[0]])
        for name, bias, _ in self.trainer.model.biases():
            bias.copy_(state[name])
        self.trainer.optimizer.publish()


class SingleProcess(ObservedTrainer):
    """The single process: all its steps, and plain autograd's gradients of the first.

    `partial_sums` as in `build_model`: this process rounds partial sums of experts' outputs where the layout does.
    """

    def __init__(
        self, config: Config, groups: Groups, text: Text, steps: int, partial_sums: Sequence[int] | None
    ) -> None:
        trainer = Trainer(config, groups, torch.device("cpu"), text.data(config), partial_sums=partial_sums)
        super().__init__(trainer)
        self.steps: list[ReferenceStep] = []
        self.formula = plain_gradients(config, groups, text, partial_sums)
        for _ in range(steps):
            before, choices = self.state(), ChoiceGaps()
            self.steps.append(ReferenceStep(before, self.step(choices), choices))
        self.trainer.close()

    def updated(self, number: int, gradients: Mapping[str, Tensor], lr: float) -> State:
        """State after step `number` (from 0) with other gradients."""
        optimizer = self.trainer.optimizer
        self.begin_with(self.steps[number].before)
        optimizer.steps = number
        optimizer.begin_step()
        for name, accumulated in optimizer.gradients().items():
            accumulated.copy_(gradients[name].view_as(accumulated))
        optimizer.step(lr, optimizer.reduce_gradients())
        return {name: tensor.to_local().clone() for name, tensor in optimizer.state().items()}


def _unused(config: Config) -> set[str]:
    """Losses that are measured but have no weight in this run."""
    weights = {"loss_device": config.balance.device_loss, "loss_communication": config.balance.communication_loss}
    return {name for name, weight in weights.items() if not weight}


def plain_gradients(
    config: Config, groups: Groups, text: Text, partial_sums: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Gradients of the first step by plain autograd on the whole model, by global name, FP32.

    The model's own forward runs on one micro-batch after another. No schedule, executor, cut graph, recomputation or
    optimizer takes part.
    """
    model = config.model
    experts, recipe = range(model.n_routed_experts), config.precision.make()
    dispatcher = make_dispatcher(config, groups, recipe, torch.device("cpu"), partial_sums)
    network = Transformer(model, dispatcher, experts, kernels=Kernels.make(False), recipe=recipe)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision.format])
    initialise(network, config.run.seed)
    parameters = list(network.parameters())
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    progress, sequences = next(steps_from(Progress(), config.batch))
    tokens, depths = sequences * config.batch.sequence_length, model.num_nextn_predict_layers
    with Loader(
        text.data(config).train,
        [(progress.sequences, sequences)],
        dp_rank=0,
        dp_size=1,
        micro_sequences=config.batch.micro_sequences,
    ) as loader:
        for batch in next(loader):
            out = network(batch.tokens, batch.valid, dropping=dropping_of(config, batch))
            balance = config.balance
            loss = out.loss / tokens + balance.expert_loss * out.balance / sequences
            loss = (
                loss + (balance.device_loss * out.device + balance.communication_loss * out.communication) / sequences
            )
            for mtp_loss in out.mtp_losses:
                loss = loss + config.train.mtp_weight.at(0) * mtp_loss / depths / tokens
            made = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, made, strict=True):
                if gradient is not None:
                    total += gradient
    by_parameter = dict(zip(parameters, sums, strict=True))
    return {
        name: tensor
        for item in local_parameters(network)
        for name, tensor in zip(item.names, item.tensors(by_parameter[item.parameter]), strict=True)
    }


def _first_row(tensor: DTensor) -> int:
    """First row on this rank of a tensor that is sharded over one mesh dimension."""
    mesh = tensor.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    return min(int(tensor.shape[0]), rows * mesh.get_local_rank())


@contextmanager
def _observed_routers(trainer: Trainer, choices: ChoiceGaps | None) -> Iterator[Tensor]:
    """Count tokens `[L, E]` by hooks on the routers, independently of the trainer's own counts."""
    model = trainer.config.model
    counts = torch.zeros(model.num_moe_layers, model.n_routed_experts, dtype=torch.int64)
    routers = trainer.model.routers()
    layer_of = {id(router): layer for layer, router in routers}

    def watch(router: Any, given: Any, routing: Any) -> None:
        layer = layer_of[id(router)]
        counts[layer] += routing.counts
        if choices is not None:
            choices.gaps.setdefault(layer, []).append(choice_gaps(router, given[0]))

    handles = [router.register_forward_hook(watch) for _, router in routers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def choice_gaps(router: Router, x: Tensor) -> Tensor:
    """Gaps `[3, T]` of a router's choices for x `[B, S, H]`.

    The rows are for the choices of groups, of experts, and of the unbiased experts that the balance loss counts.
    """
    config, top_k = router.config, router.config.num_experts_per_tok
    scores = router.scores(x).flatten(0, 1)
    grouped = router.biased(scores).unflatten(1, (config.n_group, -1))
    groups, usable = router.worth(grouped), config.topk_group if config.limits_groups else config.n_group
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(usable, -1).indices, 1.0).bool()
    experts = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    counted = scores if config.has_router_bias else experts
    return torch.stack((_gaps(groups, usable), _gaps(experts, top_k), _gaps(counted, top_k)))


def _gaps(scores: Tensor, chosen: int) -> Tensor:
    """Gap between the last chosen score and the first not chosen, of each row; infinite where all are chosen."""
    if chosen == scores.shape[1]:
        return scores.new_full(scores.shape[:1], float("inf"))
    best = scores.topk(chosen + 1, -1).values
    return best[:, chosen - 1] - best[:, chosen]
