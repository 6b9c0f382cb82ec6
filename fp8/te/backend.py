"""Transformer Engine as the backend of a model: engines of linear layers, and attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...settings import UsageError
from ..recipe import Attention, LinearRecipe
from ..tensor_formats import Formats
from . import library as libraries
from .engine import Engine
from .library import Library
from .limits import faults


class TransformerEngine:
    """Transformer Engine on one device, for a model with these formats."""

    def __init__(self, library: Library, formats: Formats) -> None:
        """Raises UsageError with every class that the library cannot compute on this GPU."""
        found = list(faults(formats, library.microscaling))
        if found:
            raise UsageError("\n".join(found))
        self.library = library

    @classmethod
    def on(cls, device: torch.device, formats: Formats) -> TransformerEngine:
        """Return the backend of `device`; raises UsageError as `load` does."""
        return cls(libraries.load(device), formats)

    @property
    def alignment(self) -> int:
        """Number that divides the number of rows of every expert."""
        return self.library.alignment

    def linear(self, recipe: LinearRecipe, num_groups: int | None = None) -> Engine:
        """Return the engine of a linear layer, or of `num_groups` experts."""
        return Engine(self.library, recipe, num_groups)

    def attention(self, heads: int, qk_width: int, v_width: int) -> Attention:
        """Return causal attention of queries that are already scaled.

        Takes query and key `[B, A, S, qk_width]` and value `[B, A, S, v_width]` (A heads) and gives
        `[B, A, S, v_width]`. All lie in memory as `[B, S, A, …]`, the layout that the library's kernels read: other
        layouts would be copied.
        """

        @cache
        def module() -> Any:  # made at the first use: models are built without memory
            return self.library.pytorch.DotProductAttention(
                num_attention_heads=heads,
                kv_channels=(qk_width, v_width),
                attention_dropout=0.0,
                qkv_format="bshd",
                attn_mask_type="causal",
                softmax_scale=1.0,  # the default, 1 / sqrt(qk_width), would scale a second time
            )

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            result: Tensor = module()(*(part.transpose(1, 2) for part in (query, key, value)))
            return result.unflatten(-1, (heads, v_width)).transpose(1, 2)

        return attend
