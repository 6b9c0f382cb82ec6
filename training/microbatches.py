"""Micro-batches of a step on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..configs.config import Config
from ..data.loader import Batch
from ..model.capacity import Dropping
from ..model.transformer import LossWeights, MicroBatch
from .objective import exempt_rows


def micro_batches_on(
    device: torch.device, batches: Sequence[Batch], config: Config, weights: LossWeights | None = None
) -> list[MicroBatch]:
    """Micro-batches for training with `weights`, or for evaluation: no MTP module runs and no token is dropped."""
    tokens = copies_on(device, [batch.tokens for batch in batches])
    valid = copies_on(device, [batch.valid for batch in batches])
    if weights is None:
        return [MicroBatch(rows, real, mtp=False) for rows, real in zip(tokens, valid, strict=True)]
    droppings: list[Dropping | None] = [None] * len(batches)
    factor = config.balance.capacity_factor
    if factor is not None:
        exempt = copies_on(device, [exempt_rows(config, batch) for batch in batches])
        droppings = [Dropping(factor, rows) for rows in exempt]
    return [
        MicroBatch(rows, real, weights, dropping=dropping)
        for rows, real, dropping in zip(tokens, valid, droppings, strict=True)
    ]


def copies_on(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """CPU tensors of one shape on `device`, with values of their own only on a GPU.

    They reach a GPU in one copy from pinned memory, for which the host does not wait. The allocator of pinned memory
    keeps the source until the copy is done.
    """
    if device.type == "cpu":
        return list(tensors)
    together = torch.stack(list(tensors))
    if device.type == "cuda":
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True))
