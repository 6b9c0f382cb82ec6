"""Chunks, optimizer and executor of a rank, built from a configuration and a place in the grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.p2p import PipelineChannels
from ..comm.routed import RoutedDispatcher
from ..configs.config import Config
from ..fp8.linear import GroupedLinear, Linear
from ..fp8.number_formats import DTYPES
from ..fp8.recipe import Recipe
from ..local_parameter import LocalParameter
from ..model.feed_forward import MixtureOfExperts
from ..model.kernels import Kernels
from ..model.naming import initial_tensor, local_parameters, router_biases
from ..model.router import Router
from ..model.transformer import Part, Transformer
from ..parallel.executor import Executor
from ..parallel.groups import Groups
from ..parallel.layout import Layout
from ..parallel.optimizer.adamw import adamw
from ..parallel.optimizer.fused_adamw import FusedAdamW
from ..parallel.optimizer.sharded import ShardedOptimizer
from ..parallel.overlap_orders import find_order
from ..parallel.schedule.actions import Schedule
from ..parallel.stages import Split
from ..plan.pipeline import example_schedule, make_split
from .backend import choose_recipe
from .dispatch import make_dispatcher
from .schedules import links_of_run


@dataclass(frozen=True)
class Model:
    """The chunks of this rank by stage, and the ranks that share their parameters.

    The first and the last stage on one rank share one embedding.
    """

    chunks: Mapping[int, Transformer]
    schedule: Schedule
    """One of the run's schedules, for its stages, which all schedules of a run share."""
    recipe: Recipe
    """Quantised classes of tensors, and the monitor that observes them."""
    dispatcher: RoutedDispatcher
    """Dispatcher of all chunks."""

    def placed(self) -> list[LocalParameter]:
        """Every parameter of this rank once: the embedding, then stage by stage."""
        found: dict[int, LocalParameter] = {}
        for stage, chunk in self.chunks.items():
            for item in local_parameters(chunk):
                held_by = replace(item, holders=self._holders(item.names[0], stage))
                found.setdefault(id(item.parameter), held_by)
        # The first and the last stage may hold the embedding. It comes first on both, because replicas share one order.
        return sorted(found.values(), key=lambda item: item.names[0] != "embedding")

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of this rank once, by the name its module gives it, which is unique in the whole model."""
        yield from {name: p for chunk in self.chunks.values() for name, p in chunk.named_parameters()}.items()

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of this rank by its name; the chunks themselves by their stage."""
        for stage, chunk in self.chunks.items():
            for name, module in chunk.named_modules():
                yield name or f"stage {stage}", module

    def routers(self) -> list[tuple[int, Router]]:
        """The routers of this rank, each with the number of its layer among all MoE layers of the model."""
        return [
            (chunk.first_moe + number, router)
            for chunk in self.chunks.values()
            for number, router in enumerate(chunk.routers())
        ]

    def mixtures(self) -> list[tuple[int, MixtureOfExperts]]:
        """The MoE layers of this rank, each with its number among all MoE layers of the model."""
        return [
            (chunk.first_moe + number, layer)
            for chunk in self.chunks.values()
            for number, layer in enumerate(chunk.mixtures())
        ]

    def biases(self) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """The routers' biases: name, tensor and the pipeline ranks that hold it."""
        for stage, chunk in self.chunks.items():
            for name, bias in router_biases(chunk).items():
                yield name, bias, self.schedule.holders(stage)

    def accumulations(self, served: Mapping[int, int]) -> dict[nn.Parameter, int]:
        """Number of gradients of each parameter in a step where stage s serves `served[s]` micro-batches."""
        expected: dict[nn.Parameter, int] = {}
        for stage, chunk in self.chunks.items():
            depths = len(chunk.mtp)
            # The head predicts for every depth; the embedding is read by the first layer and by every MTP module.
            several = {"head": 1 + depths, "embedding": chunk.part.first + depths}
            for name, parameter in chunk.named_parameters():
                expected[parameter] = expected.get(parameter, 0) + served[stage] * several.get(name, 1)
        return expected

    def _holders(self, name: str, stage: int) -> tuple[int, ...]:
        with_mtp = any(chunk.config.num_nextn_predict_layers for chunk in self.chunks.values())
        return embedding_holders(self.schedule, with_mtp) if name == "embedding" else self.schedule.holders(stage)


def embedding_holders(schedule: Schedule, with_mtp: bool) -> tuple[int, ...]:
    """Pipeline ranks with an embedding: the ranks of the first stage, and with MTP those of the last too."""
    last = schedule.holders(schedule.num_stages - 1) if with_mtp else ()
    return tuple(sorted({*schedule.holders(0), *last}))


def make_groups(config: Config, layout: Layout, device_type: str, ranks: Sequence[int] | None = None) -> Groups:
    """The process groups of a run: the layout's, and those of every set of pipeline ranks that share parameters."""
    holders, links = sharing_of_run(config, layout)
    return Groups.create(layout, device_type, ranks, config.parallel.timeout, holders, links, config.comm.max_ctas)


def sharing_of_run(config: Config, layout: Layout) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
    """Sets of pipeline ranks that hold a parameter in common, and pairs of them that send to each other."""
    schedule = example_schedule(config)
    holders = {schedule.holders(stage) for stage in range(schedule.num_stages)}
    holders.add(embedding_holders(schedule, config.model.num_nextn_predict_layers > 0))
    return sorted(holders), sorted(links_of_run(config, layout))


def build_model(
    config: Config, groups: Groups, device: torch.device, partial_sums: Sequence[int] | None = None
) -> Model:
    """This rank's chunks: its stages, without the experts of other ranks. Their weights are not set yet.

    `partial_sums` are the `nodes` of `make_dispatcher`.
    """
    split, schedule, recipe = make_split(config), example_schedule(config), choose_recipe(config, device)
    dispatcher = make_dispatcher(config, groups, recipe, device, partial_sums)
    chunks: dict[int, Transformer] = {}
    for stage in sorted(schedule.stages_of_rank[groups.coordinates.pp]):
        chunks[stage] = _build_chunk(config, groups, device, recipe, dispatcher, split, stage)
    first, last = chunks.get(0), chunks.get(split.num_stages - 1)
    if first is not None and last is not None and hasattr(last, "embedding"):
        last.embedding = first.embedding
    return Model(chunks, schedule, recipe, dispatcher)


def _build_chunk(
    config: Config,
    groups: Groups,
    device: torch.device,
    recipe: Recipe,
    dispatcher: RoutedDispatcher,
    split: Split,
    stage: int,
) -> Transformer:
    per_rank = config.model.n_routed_experts // groups.layout.ep
    first_expert = groups.coordinates.ep * per_rank
    with torch.device("meta"):
        chunk = Transformer(
            config.model,
            dispatcher,
            range(first_expert, first_expert + per_rank),
            recompute=config.memory.recompute,
            kernels=Kernels.make(config.run.compile),
            part=Part(split.layers[stage], first=stage == 0, last=stage == split.num_stages - 1),
            recipe=recipe,
        )
    # Parameters take the format that is not quantised; the routers' biases stay FP32.
    for parameter in chunk.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision.format])
    chunk.to_empty(device=device)
    for bias in router_biases(chunk).values():
        bias.zero_()
    return chunk


def build_optimizer(config: Config, model: Model, groups: Groups) -> ShardedOptimizer:
    """The optimizer of `model`. Weights get their initial values here: FP32 masters, rounded once."""
    backend = model.recipe.backend
    update = adamw if backend is None else FusedAdamW(backend.library)
    optimizer = ShardedOptimizer(model.placed(), groups, config.optim, update)
    for chunk in model.chunks.values():
        chunk.before_use = optimizer.wait_for
    for _, module in model.modules():
        if isinstance(module, Linear | GroupedLinear):
            module.gradients = optimizer  # for products that add to the optimizer's buffers themselves
    std, seed = config.model.initializer_range, config.run.seed
    device_type = next(iter(model.parameters()))[1].device.type
    optimizer.initialise(lambda name, shape: initial_tensor(name, shape, std, seed, device_type))
    return optimizer


def build_executor(config: Config, model: Model, groups: Groups, device: torch.device) -> Executor:
    """The executor of `model`'s chunks."""
    batch = config.batch
    return Executor(
        model.chunks,
        PipelineChannels(groups.coordinates.pp, groups.channels, groups.meter),
        find_order(config.parallel.overlap_order),
        torch.Size((batch.micro_sequences, batch.sequence_length, config.model.hidden_size)),
        DTYPES[config.precision.format],
        device,
        model.dispatcher.options.in_flight.boundary,
    )


def dp_rank(groups: Groups) -> int:
    """This rank's index among those that share the global batch."""
    return dist.get_rank(groups.dp)
