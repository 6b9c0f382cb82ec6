"""Feed-forward layers: dense, shared and routed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..comm.dispatcher import Dispatched, Dispatcher
from ..fp8.emulated import one_kernel_cache
from ..fp8.kept import Kept
from ..fp8.linear import GroupedLinear, Linear
from ..fp8.recipe import LinearRecipe, Recipe
from .cached_swiglu import cached_swiglu
from .config import ModelConfig
from .kernels import Kernels, SwiGLUFunction, swiglu
from .recompute import Saved
from .router import Router


class FeedForward(nn.Module):
    """SwiGLU feed-forward `[B, S, H]` -> `[B, S, H]`; gate and up projection are one GEMM."""

    def __init__(
        self, hidden: int, inner: int, kernels: Kernels, up: LinearRecipe | None, down: LinearRecipe | None
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Linear(hidden, 2 * inner, up)
        self.down = Linear(inner, hidden, down)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        gate_up = self.gate_up(x, rebuilt=saved.rebuilds(x))
        return self.down(*_swiglu(gate_up, None, self.down, self.kernels, saved))


class RoutedExperts(nn.Module):
    """Routed experts that this rank holds: rows `[R, H]` sorted by expert -> `[R, H]`."""

    def __init__(self, config: ModelConfig, num_local: int, kernels: Kernels, recipe: Recipe) -> None:
        super().__init__()
        self.kernels = kernels
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up = GroupedLinear(num_local, hidden, 2 * inner, recipe.linear("experts_up"))
        self.down = GroupedLinear(num_local, inner, hidden, recipe.linear("experts_down"))

    def forward(self, rows: Dispatched, saved: Saved) -> Tensor:
        """Run the experts, and take x and its codes from `rows`, so that they are free once they have been read."""
        counts, incoming = rows.tokens_per_expert, rows.incoming
        incoming.wanted = self.down.reads_codes
        x, codes = rows.take()
        gate_up = self.gate_up(x, rows.offsets, counts=counts, codes=codes)
        del x, codes
        activated, kept = _swiglu(gate_up, rows.weights, self.down, self.kernels, saved)
        del gate_up
        return self.down(activated, rows.offsets, kept, counts, incoming=incoming.take)


class MixtureOfExperts(nn.Module):
    """Parts of DeepSeekMoE (V3 §2.1.2); the block runs them in phases.

    `local_experts` are the global numbers of the experts that this rank holds, in the order of their weights. The
    router chooses experts. The dispatcher takes places; `place` translates experts into places.
    """

    def __init__(
        self, config: ModelConfig, experts: Sequence[int], dispatcher: Dispatcher, kernels: Kernels, recipe: Recipe
    ) -> None:
        super().__init__()
        self.local_experts = tuple(experts)
        self._places: Tensor | None = None  # [E + 1, X], places of each expert; None if experts are in order
        self._replicas: Tensor | None = None  # [E + 1], number of places of each expert; None if each has one
        self.dispatcher = dispatcher
        self.gate = Router(config)
        self.experts = RoutedExperts(config, len(self.local_experts), kernels, recipe)
        self.shared: FeedForward | None = None
        if config.n_shared_experts:
            inner = config.n_shared_experts * config.moe_intermediate_size
            up, down = recipe.linear("shared_up"), recipe.linear("shared_down")
            self.shared = FeedForward(config.hidden_size, inner, kernels, up, down)

    def place(self, expert_ids: Tensor) -> Tensor:
        """Places of experts `[T, K]`: rank of the group x experts per rank + place on that rank. An expert's place is
        its number until `hold` changes it; -1, for a choice that is sent nowhere, stays -1."""
        if self._places is None:
            return expert_ids
        if self._replicas is None:
            return self._places[expert_ids, 0]
        token = torch.arange(len(expert_ids), device=expert_ids.device).unsqueeze(1)
        return self._places[expert_ids, token % self._replicas[expert_ids]]

    def hold(self, placement: Sequence[int], rank: int, num_ranks: int) -> None:
        """Let place p of the layer hold expert `placement[p]`; this is rank `rank` of `num_ranks`. The caller moves the
        weights.

        Tokens of an expert with replicas are sent to the replicas in turn, by the token's number in the micro-batch.
        """
        experts = self.gate.config.n_routed_experts
        per_rank = len(placement) // num_ranks
        self.local_experts = tuple(placement[rank * per_rank : (rank + 1) * per_rank])
        self._places = self._replicas = None
        if list(placement) == list(range(experts)):
            return
        places: list[list[int]] = [[] for _ in range(experts)]
        for place, expert in enumerate(placement):
            places[expert].append(place)
        places.append([-1])  # found by an index of -1
        most, device = max(map(len, places)), self.gate.weight.device
        self._places = torch.tensor([[*held, *[-1] * (most - len(held))] for held in places], device=device)
        if most > 1:
            self._replicas = torch.tensor([len(held) for held in places], device=device)


def _swiglu(
    gate_up: Tensor, weights: Tensor | None, down: Linear | GroupedLinear, kernels: Kernels, saved: Saved
) -> tuple[Tensor, Kept | None]:
    """SwiGLU's output, and if `down` caches SwiGLU's input, the output's substitute for the backward."""
    quantizer = one_kernel_cache(down.recipe, gate_up)
    if quantizer is not None:
        return cached_swiglu(gate_up, weights, quantizer)
    kept = down.keep(gate_up)
    if kept is not None:
        hidden: Tensor = SwiGLUFunction.apply(gate_up, weights, kernels, kept)
        more = () if weights is None else (weights.detach(),)
        return hidden, kept.and_then(more, lambda gate_up, weights=None: swiglu(gate_up, weights, kernels))

    hidden = SwiGLUFunction.apply(gate_up, weights, kernels)
    saved.rebuild((hidden,), lambda: (swiglu(gate_up, weights, kernels),))
    return hidden, None
