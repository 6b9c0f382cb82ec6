"""Multi-head latent attention (V3 §2.1.1, equations 1-11)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..fp8.linear import Linear
from ..fp8.recipe import Recipe
from .config import ModelConfig
from .core_attention import attend
from .kernels import AssembleFunction, Kernels, assembled
from .norm import RMSNorm
from .recompute import Keep, Saved
from .rope import softmax_scale


class LatentAttention(nn.Module):
    """MLA: queries and keys-values pass through narrow latents, and all heads share one rotary key.

    Without `q_lora_rank` queries are projected directly. x `[B, S, H]` -> `[B, S, H]`.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        hidden, heads, quantized = config.hidden_size, config.num_attention_heads, recipe.linear("attention")
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, quantized)
        else:
            self.q_down = Linear(hidden, config.q_lora_rank, quantized)
            self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, kernels)
            self.q_up = Linear(config.q_lora_rank, heads * config.qk_head_dim, quantized)
        self.kv_down = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, quantized)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps, kernels)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), quantized)
        for up in self._up_projections():  # a fifth of a layer's deferred bytes, a tenth of its W
            up.may_wait = False
        self.out = Linear(heads * config.v_head_dim, hidden, recipe.linear("attention_out"))
        self._library = recipe.attention(heads, config.qk_head_dim, config.v_head_dim)
        self._products = recipe.products

    def _up_projections(self) -> tuple[Linear, ...]:
        return (self.kv_up,) if self.config.q_lora_rank is None else (self.q_up, self.kv_up)

    def forward(self, x: Tensor, rotary: Tensor, saved: Saved, same: Tensor | None = None) -> Tensor:
        """`same` is x once more, for a gradient of its own."""
        rebuilt = saved.rebuilds(x)
        first = self.q_proj if self.config.q_lora_rank is None else self.q_down
        query = first(x, rebuilt=rebuilt)
        key_value, rotary_key = self.kv_down(x if same is None else same, rebuilt=rebuilt).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1
        )
        if self.config.q_lora_rank is not None:
            query = self.q_norm(query, saved)
        latents = query, self.kv_norm(key_value, saved)
        parts = self._up_project(*latents, rotary_key, rotary, saved)
        # The latents are kept, their norms and up-projections are not (V3 §3.2.3).
        queries, keys = (saved.lend(latent) for latent in latents)
        saved.rebuild(parts, lambda: self._up_project(queries(), keys(), rotary_key, rotary, Keep()))
        del query, latents
        attended, kept = attend(*parts, self.out.keep, self._library, self._products)
        return self.out(attended, kept)

    def _up_project(
        self, query: Tensor, key_value: Tensor, rotary_key: Tensor, rotary: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, A, S, …]` for attention (A heads), from the latents behind their norms."""
        heads = self.config.num_attention_heads
        if self.config.q_lora_rank is not None:
            query = self.q_up(query, rebuilt=saved.rebuilds(query))
        key_value = self.kv_up(key_value, rebuilt=saved.rebuilds(key_value))
        run: Callable[..., tuple[Tensor, Tensor, Tensor]] = assembled
        if torch.is_grad_enabled():
            run = AssembleFunction.apply
        return run(
            query.unflatten(-1, (heads, -1)),
            key_value.unflatten(-1, (heads, -1)),
            rotary_key,
            rotary,
            self.scale,
        )
