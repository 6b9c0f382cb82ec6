"""Sums of a step over micro-batches, stages and ranks, and the means computed from them.

L MoE layers (MTP modules last), E experts, D MTP depths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.meter import numbers_of, traffic_of
from ..model.config import ModelConfig
from ..model.transformer import Output
from ..parallel.groups import Groups
from ..report.traffic import Sent


@dataclass(frozen=True)
class Totals:
    """Sums of a step over all ranks."""

    losses: Tensor
    """FP64 `[4 + D]`: next-token loss, three balance losses, one MTP loss per depth."""
    counts: Tensor
    """`[L, E]` int64: tokens that chose each expert."""
    dropped: Tensor
    """`[L]` int64: pairs (token, expert) among them that were dropped."""
    sent: Tensor
    """Bytes and messages that ranks sent since the step before, in the order of `comm/meter.py: numbers_of`."""


@dataclass(frozen=True)
class Losses:
    """Means over a global batch: of cross-entropies in nats per token, of balance losses per sequence.

    Balance losses are summed over layers. None stands for a loss that the model does not have.
    """

    next_token: float
    mtp: float | None = None
    """Mean over MTP depths, before its weight."""
    balance: float | None = None
    device: float | None = None
    communication: float | None = None


def sum_outputs(outputs: Iterable[Output], model: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses FP64 `[4 + D]` and counts int64 `[L, E + 1]` of one rank, the dropped pairs in the last column.

    The sums are in FP64, so that the order of addition does not show.
    """
    losses = torch.zeros(4 + model.num_nextn_predict_layers, dtype=torch.float64, device=device)
    counts = torch.zeros(model.num_moe_layers, model.n_routed_experts + 1, dtype=torch.int64, device=device)
    for output in outputs:
        numbers = (output.loss, output.balance, output.device, output.communication, *output.mtp_losses)
        losses[: len(numbers)] += torch.stack(numbers).double()
        counted = torch.cat((output.counts, output.dropped.unsqueeze(1)), 1)
        counts[output.first_moe : output.first_moe + len(counted)] += counted
    return losses, counts


def sum_over_ranks(losses: Tensor, counts: Tensor, groups: Groups) -> Totals:
    """Totals of the losses and counts of `sum_outputs`, and of this step's messages, by two all-reduces."""
    groups.sum(losses)
    sent = torch.tensor(numbers_of(groups.meter.take()), device=counts.device)
    integers = torch.cat((counts.view(-1), sent))
    groups.sum(integers)
    counts, sent = integers[: counts.numel()].view(counts.shape), integers[counts.numel() :]
    return Totals(losses, counts[:, :-1], counts[:, -1], sent)


def mean_losses(totals: Totals, model: ModelConfig, sequences: int, sequence_length: int) -> Losses:
    """Means over a global batch of `sequences`. Waits for the device."""
    tokens = sequences * sequence_length
    loss, balance, device, communication, *mtp = totals.losses.tolist()
    several = model.n_group > 1
    return Losses(
        next_token=loss / tokens,
        mtp=sum(mtp) / len(mtp) / tokens if mtp else None,
        balance=balance / sequences if model.num_moe_layers else None,
        device=device / sequences if model.num_moe_layers and several else None,
        communication=communication / sequences if model.num_moe_layers and several else None,
    )


def traffic_of_step(totals: Totals) -> tuple[Sent, ...]:
    """Messages of the step, by kind, of all ranks."""
    return tuple(Sent(**vars(kind), **vars(tally)) for kind, tally in traffic_of(totals.sent.tolist()).items())
