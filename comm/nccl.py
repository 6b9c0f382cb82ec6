"""Options of NCCL's communicators, by what they are used for."""

from __future__ import annotations

from collections.abc import Iterable
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
