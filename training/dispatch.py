"""Dispatcher of a run, and the format in which it sends tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..fp8.tensor_formats import WIRE_FORMAT
from ..parallel.layout import Layout
from ..report.text.numbers import count
from ..settings import UsageError

if TYPE_CHECKING:
    import torch

    from ..comm.deepep.library import Job
    from ..comm.routed import RoutedDispatcher
    from ..comm.wire import WireFormat
    from ..configs.config import Config
    from ..fp8.recipe import Recipe
    from ..parallel.groups import Groups


logger = logging.getLogger(__name__)


def dispatcher_name(config: Config, layout: Layout, device_type: str = "cpu") -> str:
    """Name of the dispatcher that `comm.dispatcher` selects in this layout, on this kind of device."""
    asked = config.comm.dispatcher
    if asked != "auto":
        return asked
    if device_type == "cuda" and layout.ep > 1:
        missing = deepep_faults_of(config, layout, device_type)
        if not missing:
            return "deepep"
        logger.info("without DeepEP: %s", "; ".join(missing))
    return "two-hop" if nodes_of_experts(layout) > 1 else "flat"


def deepep_job(config: Config, layout: Layout, rank: int = 0) -> Job:
    """Traffic of the run that DeepEP would have to carry."""
    from ..comm.deepep.library import Job
    from ..fp8.number_formats import DTYPES

    batch, model = config.batch, config.model
    return Job(
        nodes_of_group(layout, rank),
        model.hidden_size,
        model.num_experts_per_tok,
        batch.micro_sequences * batch.sequence_length,
        DTYPES[config.precision.format],
        fp8=wire_format(config) == "fp8",
        sms=config.comm.sms,
        timeout=config.parallel.timeout,
    )


def deepep_faults_of(config: Config, layout: Layout, device_type: str) -> list[str]:
    """Reasons why DeepEP cannot carry this run, each with a remedy; empty if it can."""
    if layout.ep == 1:
        return ["DeepEP moves tokens between ranks, and with parallel.ep 1 none moves; comm.dispatcher flat works"]
    from ..comm.deepep.library import deepep_faults

    return deepep_faults(deepep_job(config, layout), device_type)


def dispatch_faults(config: Config, layout: Layout) -> list[str]:
    """Reasons why the configured dispatcher cannot be used, as far as they show in this process."""
    if config.comm.dispatcher != "deepep":
        return []
    import torch

    device = config.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return [f"comm.dispatcher is deepep: {fault}" for fault in deepep_faults_of(config, layout, device)]


def nodes_of_experts(layout: Layout) -> int:
    """Number of nodes that the experts of a layer lie on, for the rank with the most."""
    return max(len({layout.node(rank) for rank in group}) for group in layout.ep_groups())


def describe_dispatch(config: Config, layout: Layout, device_type: str = "cpu") -> str:
    """Dispatcher, ranks and wire format in words, for the header of a run."""
    name, nodes = dispatcher_name(config, layout, device_type), nodes_of_experts(layout)
    where = f"{count(layout.ep, 'rank')} on {count(nodes, 'node')}"
    return f"{name}, {where}; tokens travel in {wire_format(config).upper()}"


def wire_format(config: Config) -> str:
    """The format in which tokens reach their experts: fp8, bf16 or fp32."""
    precision, asked = config.precision, config.comm.wire
    if asked != "auto":
        return asked
    formats = precision.formats()
    same = all(formats.get(name) == WIRE_FORMAT for name in ("experts_up.input", "experts_down.gradient"))
    return "fp8" if same else precision.format


def make_dispatcher(
    config: Config, groups: Groups, recipe: Recipe, device: torch.device, nodes: Sequence[int] | None = None
) -> RoutedDispatcher:
    """Make the dispatcher of a rank, for all its layers. Raises UsageError where it cannot be used here.

    With `nodes` it is for a single process that adds up as ranks on these nodes would, see `OneProcessDispatcher`.
    """
    from ..comm.flat import FlatDispatcher
    from ..comm.one_process import OneProcessDispatcher
    from ..comm.routed import DispatchOptions
    from ..comm.two_hop import TwoHopDispatcher

    layout = groups.layout
    name = dispatcher_name(config, layout, device.type)
    experts = config.model.n_routed_experts
    options = DispatchOptions(recipe.alignment, make_wire(config, recipe), groups.meter, counts=groups.counts)
    if nodes is not None:
        return OneProcessDispatcher(experts, nodes, options)
    if name == "flat":
        return FlatDispatcher(groups.ep, experts, options)
    of_ranks = nodes_of_group(layout, groups.rank)
    if name == "two-hop":
        return TwoHopDispatcher(groups.ep, experts, options, nodes=of_ranks)
    from ..comm.deepep.adapter import DeepEPDispatcher
    from ..comm.deepep.buffers import open_buffer
    from ..comm.deepep.library import find_library

    faults = deepep_faults_of(config, layout, device.type)
    if faults:
        raise UsageError("\n".join(f"comm.dispatcher is deepep: {fault}" for fault in faults))
    buffer = open_buffer(find_library(), groups.ep, deepep_job(config, layout, groups.rank))
    return DeepEPDispatcher(groups.ep, experts, options, buffer=buffer, nodes=of_ranks)


def nodes_of_group(layout: Layout, rank: int) -> list[int]:
    """The node of each rank of the expert parallel group of `rank`."""
    return next([layout.node(member) for member in group] for group in layout.ep_groups() if rank in group)


def partial_sums_of(config: Config, layout: Layout) -> list[int] | None:
    """`nodes` of `make_dispatcher` for a single process that adds up as this layout; None if all layouts do alike."""
    if dispatcher_name(config, layout) == "flat":
        return None
    return nodes_of_group(layout, 0)


def make_wire(config: Config, recipe: Recipe) -> WireFormat:
    """Make the wire format of the run.

    In FP8 the wire quantises as the recipe's experts do; a class in another format is quantised again at its layer.
    """
    from ..comm.wire import FP8Wire, PlainWire
    from ..fp8.recipe import Quantizer

    if wire_format(config) != "fp8":
        return PlainWire()

    def quantizer(name: str) -> Quantizer:
        return Quantizer(name, WIRE_FORMAT, recipe.monitor)

    return FP8Wire(quantizer("experts_up.input"), quantizer("experts_down.gradient"))


def routing_notes(config: Config, layout: Layout) -> tuple[str, ...]:
    """Notes where the layout defeats node-limited routing; empty where it works or no token crosses nodes."""
    model, nodes = config.model, nodes_of_experts(layout)
    if nodes == 1 or not model.limits_groups:
        return ()
    reach = nodes_a_token_reaches(config, layout)
    if reach <= model.topk_group:
        return ()
    return (
        f"a token's experts can lie on {reach} of {nodes} nodes, though it is routed to {model.topk_group} groups "
        f"(model.topk_group): {model.n_group} groups on {layout.ep} ranks, {layout.gpus_per_node} per node, do not "
        "lie on one node each",
    )


def nodes_a_token_reaches(config: Config, layout: Layout) -> int:
    """Largest number of nodes that the experts of one token of a node-limited router can lie on."""
    model = config.model
    worst = 0
    for group in layout.ep_groups():
        first = group[0]
        per_rank = model.n_routed_experts // layout.ep
        of_group: list[set[int]] = [set() for _ in range(model.n_group)]
        for expert in range(model.n_routed_experts):
            node = layout.node(first + expert // per_rank)
            of_group[expert // (model.n_routed_experts // model.n_group)].add(node)
        spans = sorted(map(len, of_group), reverse=True)
        nodes = len(set().union(*of_group))
        worst = max(worst, min(sum(spans[: model.topk_group]), nodes, model.num_experts_per_tok))
    return worst
