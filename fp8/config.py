"""The `precision` section."""

from __future__ import annotations

from typing import Literal

from ..settings import Section, key


class PrecisionConfig(Section):
    """Number formats of training. Master weights and gradient accumulation are FP32 in every recipe."""

    recipe: Literal["bf16", "fp32"] = key("bf16", "format of weights and activations in the forward and backward")
