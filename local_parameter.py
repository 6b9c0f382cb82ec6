"""The contract between model, optimizer and checkpoint: which global tensors a local parameter holds.

The model names them, the optimizer shards them, the checkpoint stores them under these names. A parameter that
stacks several global tensors (the experts of a rank, or a fused gate and up projection) lists one name for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Replicas = Literal["dp", "edp"]


@dataclass(frozen=True)
class LocalParameter:
    """A local parameter and the global tensors in it.

    `parameter` has as many elements as its `names` have global tensors of shape `shape`, one after another in memory.
    `replicas` names the ranks that hold the same values: `dp` for what every rank of a stage holds, `edp` for experts.
    `holders` are the pipeline ranks that hold them, ascending: two where a schedule keeps a stage twice, or where the
    first and the last stage share the embedding. A parameter that two chunks of one rank use is listed once.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    replicas: Replicas = "dp"
    holders: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        assert self.parameter.numel() % len(self.names) == 0, (self.names, self.parameter.shape)
        assert self.parameter.is_contiguous(), self.names
        assert self.holders and list(self.holders) == sorted(set(self.holders)), (self.names, self.holders)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each global tensor."""
        if self.parameter.dim() == 1:
            assert len(self.names) == 1
            return (self.parameter.numel(),)
        columns = self.parameter.shape[-1]
        return (self.parameter.numel() // len(self.names) // columns, columns)

    def tensors(self, of: Tensor | None = None) -> list[Tensor]:
        """Views of each global tensor, in the parameter or in another tensor `of` its size."""
        flat = (self.parameter.data if of is None else of).view(len(self.names), *self.shape)
        return list(flat.unbind(0))
