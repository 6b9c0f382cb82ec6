"""One all-to-all under way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .failure import telling


class Exchange:
    """Rows on their way between the ranks of a group: launched when made, complete after `wait`.

    The rows are received into memory of their own, so the sent tensor still holds what it held; both are kept alive
    until `wait`. A group of one rank, or none, moves nothing: `wait` gives the rows back.

    Args:
        rows: `[sum(send_splits), ...]`, sorted by destination rank.
        send_splits: rows for each rank of the group.
        receive_splits: rows from each rank of the group.
        group: the ranks that take part; None is this process by itself, never the default group.
    """

    def __init__(
        self, rows: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self._sent = rows.contiguous()
        self._work: dist.Work | None = None
        if group is None or group.size() == 1:
            self._received = self._sent
            return
        self._received = torch.empty((sum(receive_splits), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        self._group = group
        with telling(self._what()):
            self._work = dist.all_to_all_single(
                self._received, self._sent, receive_splits, send_splits, group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """The received rows `[sum(receive_splits), ...]`, ordered by source rank."""
        if self._work is not None:
            with telling(self._what()):
                self._work.wait()
        return self._received

    def _what(self) -> str:
        ranks = ", ".join(map(str, dist.get_process_group_ranks(self._group)))
        return f"the all-to-all of ranks {ranks}"
