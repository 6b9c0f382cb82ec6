"""Feed-forward layers: dense, shared and routed experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..comm.dispatcher import Dispatcher
from ..fp8.linear import GroupedLinear, Linear
from .config import ModelConfig
from .kernels import Kernels, SwiGLUFunction
from .recompute import Saved
from .router import Router


class FeedForward(nn.Module):
    """SwiGLU feed-forward `[B, S, H]` -> `[B, S, H]`; gate and up projection are one GEMM."""

    def __init__(self, hidden: int, inner: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)

    def forward(self, x: Tensor, saved: Saved) -> Tensor:
        return self.down(_swiglu(self.gate_up(x), None, self.kernels, saved))


class RoutedExperts(nn.Module):
    """The routed experts that this rank holds: rows `[R, H]` sorted by expert -> `[R, H]`."""

    def __init__(self, config: ModelConfig, num_local: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = GroupedLinear(num_local, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down = GroupedLinear(num_local, config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, weights: Tensor, offsets: Tensor, saved: Saved) -> Tensor:
        return self.down(_swiglu(self.gate_up(x, offsets), weights, self.kernels, saved), offsets)


class MixtureOfExperts(nn.Module):
    """The parts of DeepSeekMoE (V3 §2.1.2); the block runs them in phases. `local_experts` are global numbers."""

    def __init__(self, config: ModelConfig, experts: Sequence[int], dispatcher: Dispatcher, kernels: Kernels) -> None:
        super().__init__()
        self.local_experts = tuple(experts)
        self.dispatcher = dispatcher
        self.gate = Router(config)
        self.experts = RoutedExperts(config, len(self.local_experts), kernels)
        self.shared: FeedForward | None = None
        if config.n_shared_experts:
            self.shared = FeedForward(
                config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, kernels
            )


def _swiglu(gate_up: Tensor, weights: Tensor | None, kernels: Kernels, saved: Saved) -> Tensor:
    def activate() -> Tensor:
        return SwiGLUFunction.apply(gate_up, weights, kernels)

    hidden = activate()
    saved.rebuild((hidden,), lambda: (activate(),))
    return hidden
