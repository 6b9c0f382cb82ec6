"""Options of NCCL's communicators, by what they are used for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..settings import UsageError
from .config import MaxCtas, Purpose


def communicator_options(purpose: Purpose, max_ctas: MaxCtas, timeout: timedelta) -> Any:
    """Options for a new group of the default group's backend; None for backends other than NCCL.

    Kernels of NCCL get a stream of high priority: behind a product that fills the GPU, an exchange would else start
    when the product ends. The cap on their blocks leaves room for every communicator of a rank at once.
    """
    if dist.get_backend() != "nccl":
        return None
    return nccl_options(getattr(max_ctas, purpose), timeout)


def nccl_options(max_ctas: int, timeout: timedelta) -> Any:
    """Options of an NCCL communicator with at most `max_ctas` blocks of threads a kernel."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    options.config.max_ctas = max_ctas
    return options


def refuse_equal_colours(groups: Iterable[tuple[int, ...]]) -> None:
    """Raise UsageError where torch gives two of these groups of ranks, made at the same time, one split colour.

    Ranks with one colour become one communicator: the two groups would then wait for each other for ever.
    """
    colour_of = getattr(dist.distributed_c10d, "_process_group_color", None)
    if colour_of is None:  # a torch that numbers its groups in another way
        return
    seen: dict[int, tuple[int, ...]] = {}
    for ranks in groups:
        before = seen.setdefault(colour_of(list(ranks)), ranks)
        if before != ranks:
            shown = " and ".join(
                f"{', '.join(map(str, some[:4]))}{', …' if some[4:] else ''}" for some in (before, ranks)
            )
            raise UsageError(
                f"torch gives the groups of ranks {shown} the same split colour, and NCCL would make one communicator "
                "of them: change parallel.ep or parallel.pp, or the number of ranks"
            )


MIB = 2**20
CONNECTION_BYTES = 14 * MIB
"""Buffers of one channel to a peer on the same node.

By NCCL's defaults 0.5 MiB for protocol LL, 4.7 for LL128 and 4 for Simple, in pieces of 2 MiB, and 2 for each side's
flags. NCCL issue 1685 measured 3.3 GB for an all-to-all of 8 GPUs with 32 channels: 14.1 MiB for each of 7 x 32.
"""

NETWORK_BYTES = 4 * MIB
"""Buffers of one channel to all peers on other nodes, which share them."""


def communicator_bytes(purpose: Purpose, ranks: Sequence[int], rank: int, gpus_per_node: int, channels: int) -> int:
    """Estimate of the GPU memory of a communicator's buffers on `rank`, once it is connected.

    All-to-alls connect every pair of a node's ranks, and transfers one pair. Reductions and gathers connect the two
    neighbours in a ring; sums over all ranks also the up to four neighbours in two trees.
    """
    others = len(ranks) - 1
    if purpose in ("experts", "counts"):
        near = sum(other // gpus_per_node == rank // gpus_per_node for other in ranks) - 1
        return channels * (near * CONNECTION_BYTES + (NETWORK_BYTES if others > near else 0))
    peers = {"pipeline": 1, "gradients": min(2, others), "control": min(6, others)}[purpose]
    return channels * peers * CONNECTION_BYTES
