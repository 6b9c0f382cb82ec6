"""Temporary replicas of experts, as inference engines have them, with the weights of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..comm.flat import FlatDispatcher
from ..comm.routed import RoutedDispatcher
from ..fp8.linear import GroupedLinear
from ..model.feed_forward import MixtureOfExperts
from ..parallel.experts.moves import copy_experts
from ..parallel.experts.placement import Placement
from ..parallel.groups import Groups


@contextmanager
def replicated(
    layer: MixtureOfExperts,
    present: Placement,
    replicas: Sequence[int],
    groups: Groups,
    dispatcher: RoutedDispatcher,
) -> Iterator[None]:
    """Give `layer` a copy of expert `replicas[p]` at each place p inside the context. There is no backward.

    `replicas` is `[P]`. Every rank of an expert parallel group enters the context. Each expert's tokens go to its
    replicas in turn, by one all-to-all in the wire format of `dispatcher`. A rank holds P / ep copies in addition to
    its parameters.
    """
    rank, ranks = groups.ep.rank(), groups.ep.size()
    experts, own_dispatcher = layer.experts, layer.dispatcher
    own = experts.gate_up, experts.down
    experts.gate_up, experts.down = (_copied(linear, present, replicas, groups) for linear in own)
    layer.dispatcher = FlatDispatcher(groups.ep, len(replicas), dispatcher.options)
    layer.hold(replicas, rank, ranks)
    try:
        yield
    finally:
        experts.gate_up, experts.down = own
        layer.dispatcher = own_dispatcher
        layer.hold(present, rank, ranks)


def _copied(linear: GroupedLinear, present: Placement, replicas: Sequence[int], groups: Groups) -> GroupedLinear:
    """A copy of the layer with the weights of other experts."""
    weight = copy_experts(linear.weight, present, replicas, groups.ep, groups.meter)
    num, out_features, in_features = weight.shape
    with torch.device("meta"):  # its own weight is never allocated
        copy = GroupedLinear(num, in_features, out_features, linear.recipe)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    return copy.train(linear.training)
