"""Multiprocessors and memory of a GPU that NCCL's communicators take in a run."""

from __future__ import annotations

from collections.abc import Iterator

from ..comm.nccl import communicator_bytes
from ..configs.config import Config
from ..parallel.communicators import Communicator, Round, communicator_rounds
from ..parallel.layout import Layout
from ..plan.pipeline import example_schedule
from ..settings import UsageError
from .build import sharing_of_run
from .dispatch import dispatcher_name


def rounds_of_run(config: Config, layout: Layout) -> list[Round]:
    """Rounds in which the ranks of a run on GPUs make their communicators."""
    return list(communicator_rounds(layout, *sharing_of_run(config, layout), counts=True))


def used_communicators(config: Config, layout: Layout, rank: int) -> Iterator[Communicator]:
    """Communicators over which `rank` sends in a step.

    NCCL connects the ranks of a communicator when they first use it, so the others take next to nothing.
    """
    schedule, pp = example_schedule(config), layout.coordinates(rank).pp
    unused = {"pp"}  # for drawings of a step
    if all(len(schedule.holders(stage)) > 1 for stage in schedule.stages_of_rank[pp]):
        unused |= {"dp", "edp"}
    for each in rounds_of_run(config, layout):
        own = each.of(rank)
        if len(own.ranks) > 1 and own.key not in unused:
            yield own


def blocks_at_once(config: Config, layout: Layout, rank: int) -> int:
    """Most multiprocessors that communication takes on a rank's GPU, with a kernel of every communicator at once."""
    caps = config.comm.max_ctas.model_dump()
    deepep = dispatcher_name(config, layout, "cuda") == "deepep"
    blocks = sum(caps[each.purpose] for each in used_communicators(config, layout, rank))
    return blocks + caps["control"] + (config.comm.sms if deepep else 0)  # the default group is for agreements


def refuse_without_room(config: Config, layout: Layout, rank: int, multiprocessors: int) -> None:
    """Raise UsageError where kernels of a rank's communicators could leave each other no multiprocessor.

    A kernel of NCCL keeps its multiprocessors until its peers take part. Were there too few for all, two ranks could
    each give them to the kernel that the other does not have room for, and wait for ever.
    """
    blocks = blocks_at_once(config, layout, rank)
    if blocks > multiprocessors:
        raise UsageError(
            f"comm.max_ctas lets communicators of rank {rank} take {blocks} multiprocessors at once, and its GPU has "
            f"{multiprocessors}: ranks could wait for each other for ever, so set some of comm.max_ctas lower"
        )


def nccl_bytes(config: Config, layout: Layout, rank: int) -> int:
    """Estimate of the memory of NCCL's buffers on a rank's GPU, see `communicator_bytes`."""
    if layout.world_size == 1:
        return 0
    caps = config.comm.max_ctas.model_dump()
    used = list(used_communicators(config, layout, rank))
    world = next(each for each in used if each.key == "world")
    return sum(
        communicator_bytes(each.purpose, each.ranks, rank, layout.gpus_per_node, caps[each.purpose])
        for each in (*used, world)  # the default group is as large
    )
