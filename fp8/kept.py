"""Tensors that a layer keeps for its backward in place of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Tensors that stay for the backward, and a function that restores the original tensor from them.

    `restore` holds no tensors. It gets them as arguments, so that autograd's hooks on saved tensors can drop them.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]

    def and_then(self, more: tuple[Tensor, ...], compute: Callable[..., Tensor]) -> Kept:
        """Tensors that restore to `compute(restored, *more)`; `more` is kept as well."""
        count = len(self.tensors)
        restore = self.restore
        return Kept((*self.tensors, *more), lambda *all: compute(restore(*all[:count]), *all[count:]))
