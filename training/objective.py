"""Objective of a step: weights of its losses, and the tokens that routers may drop."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs.config import Config
from ..data.loader import Batch
from ..model.capacity import Dropping
from ..model.transformer import LossWeights
from ..plan.steps import Progress
from ..seeds import seed_of


def loss_weights(config: Config, before: Progress, sequences: int) -> LossWeights:
    """Weights that turn the sums of micro-batches into weighted means over a global batch of `sequences`."""
    balance, tokens = config.balance, sequences * config.batch.sequence_length
    depth = max(1, config.model.num_nextn_predict_layers)
    return LossWeights(
        token=1 / tokens,
        mtp=config.train.mtp_weight.at(before.tokens) / depth / tokens,
        balance=balance.expert_loss / sequences,
        device=balance.device_loss / sequences,
        communication=balance.communication_loss / sequences,
    )


def dropping_of(config: Config, batch: Batch, device: torch.device | str = "cpu") -> Dropping | None:
    """Rule that drops tokens of a training micro-batch; None where `balance.capacity_factor` drops none."""
    factor = config.balance.capacity_factor
    return None if factor is None else Dropping(factor, exempt_rows(config, batch).to(device))


def exempt_rows(config: Config, batch: Batch) -> Tensor:
    """Rows of a micro-batch that lose no token, bool [B] on the CPU.

    A sequence is exempt by its number in the run alone. So exemption depends neither on the layout nor on a resume.
    """
    keep = config.balance.keep_sequences
    return torch.tensor([is_exempt(config.run.seed, number, keep) for number in batch.numbers])


def is_exempt(seed: int, number: int, share: float) -> bool:
    """Whether training sequence `number` is among the `share` that loses no token."""
    return seed_of("exempt from token dropping", seed, number) < share * 2**63
