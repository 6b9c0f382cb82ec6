"""All-to-alls that run while their caller continues."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import comm_errors
from .meter import GroupMeter
from .streams import lend, on_launch_stream


class Exchange:
    """Rows sent between the ranks of a group by one all-to-all: launched by the constructor, complete after `wait`.

    The rows are received into separate memory, so the sent tensor keeps its values; both are kept alive until
    `wait`. A group of one rank, or none, moves nothing: `wait` returns the rows themselves.

    Args:
        rows: `[sum(send_splits), ...]`, sorted by destination rank.
        send_splits: rows for each rank of the group.
        receive_splits: rows from each rank of the group.
        group: the ranks that take part; None is this process alone, never the default group.
        meter: counts what is sent, as `purpose`.
        into: memory for the received rows, new memory by default.
    """

    def __init__(
        self,
        rows: Tensor,
        send_splits: list[int],
        receive_splits: list[int],
        group: dist.ProcessGroup | None,
        meter: GroupMeter | None = None,
        purpose: str = "dispatch",
        into: Tensor | None = None,
    ) -> None:
        self._sent: Tensor | None = rows.contiguous()
        self._received: Tensor | None
        self._works: list[dist.Work] = []
        if group is None or group.size() == 1:
            self._received = self._sent if into is None else into.copy_(rows)
            return
        received = into
        if received is None:
            received = torch.empty((sum(receive_splits), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        self._received, self._group = received, group
        if meter is not None:
            meter.all_to_all(purpose, send_splits, rows[:1].numel() * rows.element_size())
        with comm_errors(self._description), on_launch_stream(rows.device):
            self._works = begin_all_to_all(received, self._sent, receive_splits, send_splits, group)

    def wait(self) -> Tensor:
        """Return the received rows `[sum(receive_splits), ...]`, ordered by source rank. Call once: no row is kept.

        On a GPU the current stream waits, or the stream beside it (`streams.py: beside`), not the host.
        """
        works, self._works = self._works, []
        sent, received = self._sent, self._received
        assert sent is not None and received is not None, "waited twice for one exchange"
        self._sent = self._received = None
        if works:
            with comm_errors(self._description), on_launch_stream(received.device):
                for work in works:
                    work.wait()
            lend(sent, received)
        return received

    def _description(self) -> str:
        ranks = ", ".join(map(str, dist.get_process_group_ranks(self._group)))
        return f"the all-to-all of ranks {ranks}"


def begin_all_to_all(
    received: Tensor, sent: Tensor, receive_splits: list[int], send_splits: list[int], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Launch the exchange of `sent` for `received`; neither may be changed or freed until the works are waited for.

    On CPUs every receive is posted before anything is sent. Gloo's own all-to-all posts a receive behind the data that
    it sends to the same rank. If ranks then begin at slightly different times, one direction of a link waits for the
    other: over a limited link gloo's all-to-all was seen to take twice the time.
    """
    if sent.device.type != "cpu":
        work = dist.all_to_all_single(received, sent, receive_splits, send_splits, group=group, async_op=True)
        assert work is not None
        return [work]
    here, size = group.rank(), group.size()
    into, out = received.split(receive_splits), sent.split(send_splits)
    others = [(here + step) % size for step in range(1, size)]
    works = [dist.irecv(into[rank], group=group, group_src=rank) for rank in others if receive_splits[rank]]
    works += [dist.isend(out[rank], group=group, group_dst=rank) for rank in others if send_splits[rank]]
    into[here].copy_(out[here])
    return [work for work in works if work is not None]
