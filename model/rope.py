"""Rotary position embedding with YaRN, as DeepSeek uses it (V3 §4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeScaling


def rotary_factors(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Factors on each position's pairs, `cos + i sin` of their angles: complex64 `[length, R/2]`.

    DeepSeek stores the members of a pair next to each other, so a pair in memory is a complex number.
    """
    frequencies = _frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    temperature = 1.0
    if (scaling := config.rope_scaling) is not None:
        temperature = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return torch.polar(torch.full_like(angles, temperature), angles).to(device)


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention scores: 1/sqrt of the query width, times YaRN's temperature squared if there is YaRN."""
    scale: float = config.qk_head_dim**-0.5
    if (scaling := config.rope_scaling) is not None and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _frequencies(config: ModelConfig) -> Tensor:
    width = config.qk_rope_head_dim
    plain = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.rope_scaling is None:
        return plain
    keep = _share_kept(config, config.rope_scaling)
    return plain * keep + plain / config.rope_scaling.factor * (1.0 - keep)


def _share_kept(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """Share of each frequency that YaRN leaves unchanged: 1 for fast ones, 0 for slow ones, a ramp in between."""
    width = config.qk_rope_head_dim

    def dimension_of(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1.0 - ramp.clamp(0, 1)
