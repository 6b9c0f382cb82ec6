"""Experts held several times for a while: as inference engines do it, on the weights of a training run."""

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
    """Within it `layer` holds expert `replicas[p]` at place p of `[P]`, in copies of its weights; there is no backward.

    Every rank of an expert parallel group enters it. Each expert's tokens take its replicas in turn, and travel by one
    all-to-all on the wire of `dispatcher`. P / ep copies of an expert's weights a rank come on top of its parameters.
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
    """The same layer with the weights of other experts."""
    weight = copy_experts(linear.weight, present, replicas, groups.ep, groups.meter)
    num, out_features, in_features = weight.shape
    with torch.device("meta"):  # its own weight is never allocated
        copy = GroupedLinear(num, in_features, out_features, linear.recipe)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    return copy.train(linear.training)
