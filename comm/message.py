"""Messages of two-hop dispatch: a token, its gate weights and the numbers of its experts in one row of bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.routes.rows import ALIGNMENT, message_ends


@dataclass(frozen=True)
class MessageLayout:
    """Places of the parts of a message uint8 [bytes]; bytes is a multiple of ALIGNMENT.

    dtype, width: type and number of the payload's values. top_k: K. id_type: type of the numbers of experts.
    """

    dtype: torch.dtype
    width: int
    top_k: int
    id_type: torch.dtype

    @classmethod
    def of(cls, payload: Tensor, top_k: int, num_experts: int) -> MessageLayout:
        return cls(payload.dtype, payload.shape[1], top_k, torch.int16 if num_experts <= 2**15 else torch.int32)

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """Ends of the payload, of the bytes that fill it up, of the weights and of the ids."""
        return message_ends(self.width * self.dtype.itemsize, self.top_k, self.id_type)

    def join(self, payload: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Messages uint8 [T, bytes] of a payload [T, width], weights FP32 [T, K] and ids [T, K]."""
        parts = [part.contiguous().view(torch.uint8) for part in (payload, weights, ids.to(self.id_type))]
        end, start, _, last = self.ends
        filling = parts[0].new_zeros(len(payload), start - end + -last % ALIGNMENT)
        return torch.cat((parts[0], filling[:, : start - end], *parts[1:], filling[:, start - end :]), 1)

    def payload(self, messages: Tensor) -> Tensor:
        """Payload as bytes, a view."""
        return messages[:, : self.ends[0]]

    def weights(self, messages: Tensor) -> Tensor:
        """Copy of the weights FP32 [A, K]."""
        return _copy(messages[:, self.ends[1] : self.ends[2]], torch.float32)

    def ids(self, messages: Tensor) -> Tensor:
        """Copy of the numbers of experts [A, K]."""
        return _copy(messages[:, self.ends[2] : self.ends[3]], self.id_type)


def _copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy of one part. A view would fail: a single row may start at any address."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
