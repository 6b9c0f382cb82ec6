"""Balance of tokens: over experts, over the ranks that hold them, and over the nodes of these ranks.

L MoE layers (those of MTP modules last), E experts of a layer, R ranks of an expert parallel group, N nodes of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor


class LayerBalance(BaseModel):
    """Measures of balance, one value per MoE layer, in order; 0 is perfect balance. None where nothing is compared."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    max_vio: tuple[float, ...]  # (fullest expert - mean) / mean, MaxVio of arXiv 2408.15664
    load_cv: tuple[float, ...]  # standard deviation of the experts' loads / mean
    rank_vio: tuple[float, ...] | None = None  # as max_vio, of the ranks that hold the experts; None for one rank
    node_vio: tuple[float, ...] | None = None  # the same of their nodes
    dropped: tuple[float, ...]  # share of the (token, expert) pairs that were dropped

    def summary(self) -> dict[str, float | None]:
        """Mean over layers of each measure under its name, and the worst layer's value under the name with `_worst`."""
        summed: dict[str, float | None] = {}
        for name in type(self).model_fields:
            values = getattr(self, name)
            summed[name] = sum(values) / len(values) if values else None
            summed[f"{name}_worst"] = max(values) if values else None
        return summed


def measure_balance(
    counts: Tensor,
    dropped: Tensor,
    rank_of_expert: Tensor | Sequence[int] | Sequence[Sequence[int]],
    node_of_rank: Sequence[int],
) -> LayerBalance:
    """Balance of one step's global batch.

    Args:
        counts: int64 `[L, E]`, tokens that chose each expert, over all ranks.
        dropped: int64 `[L]`, (token, expert) pairs among them that were dropped. The other measures include them.
        rank_of_expert: the rank 0 … R - 1 that holds each expert, `[E]` or by layer `[L, E]`. Where several expert
            parallel groups hold copies, a rank stands for the ranks with its number in all of these groups.
        node_of_rank: `[R]`, any number for each node.
    """
    ranks = len(node_of_rank)
    held = counts.new_tensor(rank_of_expert) if isinstance(rank_of_expert, Sequence) else rank_of_expert
    on_ranks = counts.new_zeros(counts.shape[0], ranks).scatter_add_(1, held.expand(counts.shape), counts)
    names = sorted(set(node_of_rank))
    nodes = counts.new_tensor([names.index(node) for node in node_of_rank]).expand(on_ranks.shape)
    on_nodes = counts.new_zeros(counts.shape[0], len(names)).scatter_add_(1, nodes, on_ranks)
    return LayerBalance(
        max_vio=excess(counts),
        load_cv=variation(counts),
        rank_vio=excess(on_ranks) if ranks > 1 else None,
        node_vio=excess(on_nodes) if len(names) > 1 else None,
        dropped=tuple((dropped.double() / counts.sum(1).clamp(min=1)).tolist()),
    )


def excess(loads: Tensor) -> tuple[float, ...]:
    """Excess of the largest of `loads` `[L, …]` over the mean, (largest - mean) / mean, per layer.

    A layer without any token counts as 0. Source: MaxVio of arXiv 2408.15664.
    """
    return _relative(loads, lambda counts, mean: counts.amax(dim=1) - mean)


def variation(loads: Tensor) -> tuple[float, ...]:
    """Coefficient of variation of `loads` `[L, …]`, standard deviation / mean, per layer; 0 without any token."""
    return _relative(loads, lambda counts, mean: counts.std(dim=1, correction=0))


def _relative(loads: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, ...]:
    if loads.ndim != 2 or not loads.shape[1]:
        raise ValueError(f"loads must be [layers, experts] and of some experts, got {list(loads.shape)}")
    counts = loads.double()
    mean = counts.mean(dim=1)
    at_least = 1.0 / counts.shape[1]  # the smallest mean of a layer with a token
    return tuple((measure(counts, mean) / mean.clamp(min=at_least)).clamp(min=0.0).tolist())
