"""Rotary position embedding with YaRN, as DeepSeek uses it (V3 §4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeScaling


def rotary_factors(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Tensor:
    """What a position's pairs are multiplied by, `cos + i sin` of their angles: complex64 `[length, R/2]`.

    DeepSeek stores the members of a pair side by side, so a pair is a complex number as it lies in memory.
    """
    frequencies = _frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    temperature = 1.0
    if (scaling := config.rope_scaling) is not None:
        temperature = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return torch.polar(torch.full_like(angles, temperature), angles).to(device)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt of the query width, times YaRN's temperature squared where the context was extended."""
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
    """How much of each frequency YaRN leaves alone: 1 for fast ones, 0 for slow ones, a ramp between."""
    width = config.qk_rope_head_dim

    def dimension_of(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return 1.0 - ramp.clamp(0, 1)
