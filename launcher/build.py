"""From a configuration and a place in the grid to a model and its optimizer."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..comm.flat import FlatDispatcher
from ..model.kernels import Kernels
from ..model.naming import initial_tensor, placements, router_biases
from ..model.transformer import Transformer
from ..parallel.groups import Groups
from ..parallel.zero import ShardedOptimizer
from .config import Config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: Config, groups: Groups, device: torch.device) -> Transformer:
    """This rank's part of the model: everything but the experts of other ranks. Its weights are not set yet."""
    experts = config.model.n_routed_experts
    per_rank = experts // groups.layout.ep
    first = groups.coordinates.ep * per_rank
    with torch.device("meta"):
        model = Transformer(
            config.model,
            FlatDispatcher(groups.ep, experts),
            range(first, first + per_rank),
            recompute=config.train.recompute,
            kernels=Kernels.make(config.train.compile),
        )
    # Parameters take the recipe's format; the routers' biases stay FP32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision.recipe])
    model.to_empty(device=device)
    for bias in router_biases(model).values():
        bias.zero_()
    return model


def build_optimizer(config: Config, model: Transformer, groups: Groups) -> ShardedOptimizer:
    """The optimizer of `model`, whose weights it sets to their initial values: FP32 masters, rounded once."""
    optimizer = ShardedOptimizer(placements(model), groups, config.optim)
    std, seed = config.model.initializer_range, config.run.seed
    optimizer.initialise(lambda name, shape: initial_tensor(name, shape, std, seed))
    return optimizer


def dp_rank(groups: Groups) -> int:
    """This rank's index among those that share the global batch."""
    return dist.get_rank(groups.dp)
