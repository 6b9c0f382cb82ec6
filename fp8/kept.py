"""Tensors that a layer keeps for its backward in place of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .quantize import BlockQuantized


@dataclass(frozen=True)
class Kept:
    """Tensors that stay for the backward, and a function that restores the original tensor from them.

    `restore` holds no tensors. It gets them as arguments, so that autograd's hooks on saved tensors can drop them.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]
    columns: Callable[..., BlockQuantized] | None = None
    """Quantise the restored matrix to E4M3 in tiles of (128, 1), for W, where one kernel of a GPU does both. Takes the
    tensors, then `groups` and `pow2_scales` as in `fp8/operations.py`."""

    def and_then(self, more: tuple[Tensor, ...], compute: Callable[..., Tensor]) -> Kept:
        """Tensors that restore to `compute(restored, *more)`; `more` is kept as well."""
        count = len(self.tensors)
        restore = self.restore
        return Kept((*self.tensors, *more), lambda *all: compute(restore(*all[:count]), *all[count:]))
