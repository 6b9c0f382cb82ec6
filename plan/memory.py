"""Bytes that a micro-batch holds on a rank between its actions, predicted from the configuration.

Two numbers decide how a schedule may order its actions: what a forward in flight holds until its backward, and what a
deferred W holds until it runs. They are sums over the layers of a stage. Rows of experts are those of an even routing.
A dry run counts every byte of a rank; these numbers are for the choice of a schedule, before anything is built.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.config import Config
from ..parallel.stages import Split

BYTES = {"bf16": 2.0, "fp32": 4.0, "e4m3": 1.0, "e5m2": 1.0, "e5m6": 1.5}
SCALE = 4 / 128
"""Bytes of the FP32 scale of a tile of 128 elements, per element."""
ROW = 300
"""Bytes of weight, places and indices per row that is routed to an expert, whatever is recomputed."""


@dataclass(frozen=True)
class Held:
    """Bytes of one micro-batch in one layer."""

    forward: float = 0.0
    """From the F to the B or I."""
    weights: float = 0.0
    """From an I to its W."""

    def __add__(self, other: Held) -> Held:
        return Held(self.forward + other.forward, self.weights + other.weights)

    def times(self, factor: float) -> Held:
        """Both numbers multiplied by `factor`."""
        return Held(self.forward * factor, self.weights * factor)


def held_by_stage(config: Config, split: Split) -> list[Held]:
    """Bytes of one micro-batch in the layers of each stage. Embedding, head and MTP modules are left out."""
    of = {moe: _Layer(config).held(moe) for moe in (False, True)}
    return [sum((of[config.model.is_moe(layer)] for layer in layers), Held()) for layers in split.layers]


class _Layer:
    """Sizes of the tensors that one layer holds, in bytes per token or per row of an expert."""

    def __init__(self, config: Config) -> None:
        self.model, self.recompute = config.model, config.memory.recompute
        self.tokens = config.batch.micro_sequences * config.batch.sequence_length
        self.formats = config.precision.formats()
        self.high = BYTES[config.precision.format]

    def held(self, moe: bool) -> Held:
        model = self.model
        held = self._attention().times(self.tokens)
        if not moe:
            return held + self._feed_forward("dense_up", "dense_down", model.intermediate_size).times(self.tokens)
        if model.n_shared_experts:
            inner = model.n_shared_experts * model.moe_intermediate_size
            held += self._feed_forward("shared_up", "shared_down", inner).times(self.tokens)
        if self.recompute == "none" and self.formats:  # the router reads the norm's output, the linear layers its codes
            held += Held(model.hidden_size * self.high).times(self.tokens)
        experts = self._feed_forward("experts_up", "experts_down", model.moe_intermediate_size, arrives=True)
        return held + (experts + Held(ROW)).times(self.tokens * model.num_experts_per_tok)

    def _attention(self) -> Held:
        """MLA with both norms of its block. Its up-projections never leave their W for later."""
        model, high, hidden = self.model, self.high, self.model.hidden_size
        heads, keys = model.num_attention_heads, model.kv_lora_rank + model.qk_rope_head_dim
        query, attended = model.q_lora_rank or heads * model.qk_head_dim, heads * model.v_head_dim
        normed, out = self._size("attention.input"), attended * self._cache("attention_out")
        forward = hidden * high  # the block's input
        if self.recompute != "full":
            statistics = 4 * heads
            forward += (hidden + query + keys) * high + out + statistics
        if self.recompute == "none":
            ranks = (model.q_lora_rank or 0) + model.kv_lora_rank
            forward += (hidden + ranks) * normed + (2 * heads * model.qk_head_dim + attended) * high
        gradients = (query + keys) * self._size("attention.gradient") + hidden * self._size("attention_out.gradient")
        return Held(forward, hidden * normed + attended * self._size("attention_out.input") + gradients)

    def _feed_forward(self, up: str, down: str, inner: int, arrives: bool = False) -> Held:
        """SwiGLU feed-forward; `arrives` where its input came from other ranks, so that it cannot be rebuilt."""
        hidden, given, cached = self.model.hidden_size, self._size(f"{up}.input"), bool(self.formats)
        gate_up, activated = 2 * inner * self._cache(down), inner * self.high
        forward = 0.0
        if self.recompute != "full":
            forward += gate_up + (hidden * given if arrives else 0.0)
        if self.recompute == "none":
            forward += (0.0 if arrives else hidden * given) + (0.0 if cached else activated)
        gradients = 2 * inner * self._size(f"{up}.gradient") + hidden * self._size(f"{down}.gradient")
        return Held(forward, hidden * given + inner * self._size(f"{down}.input") + gradients)

    def _size(self, name: str) -> float:
        """Bytes of an element of a class of tensors."""
        format = self.formats.get(name)
        return self.high if format is None else BYTES[format.fmt] + SCALE

    def _cache(self, kind: str) -> float:
        return self._size(f"{kind}.cache")
