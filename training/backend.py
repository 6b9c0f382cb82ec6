"""Backend that computes on a rank's device: NVIDIA's Transformer Engine, or PyTorch with emulated FP8."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ..configs.config import Config
from ..fp8.te.library import HOPPER_ALIGNMENT, version_fault
from ..fp8.te.limits import INSTEAD
from ..fp8.tensor_formats import KINDS, Formats
from ..model.config import ModelConfig
from ..settings import UsageError, nearest_multiples

if TYPE_CHECKING:
    import torch

    from ..fp8.recipe import Recipe

logger = logging.getLogger(__name__)


def choose_recipe(config: Config, device: torch.device) -> Recipe:
    """Recipe of the model's layers on `device`, with the backend of `precision.backend`.

    `auto` takes Transformer Engine on a GPU where Transformer Engine can do everything configured. Where it cannot, a
    recipe that quantises nothing does without, and the log has the reasons. Raises UsageError, naming the version,
    architecture or key, where `te` is set and cannot be used, and where `auto` would emulate FP8 on a GPU: that is
    several times slower than BF16.
    """
    precision, recipe = config.precision, config.precision.make()
    if precision.backend == "emulated" or (precision.backend == "auto" and device.type == "cpu"):
        return recipe
    from ..fp8.te.backend import TransformerEngine

    try:
        for _, fault in precision.te_faults():
            raise UsageError(fault)
        backend = TransformerEngine.on(device, recipe.formats)
        for fault in _width_faults(config, backend.alignment):
            raise UsageError(fault)
    except UsageError as error:
        if precision.backend == "te":
            raise UsageError(f"precision.backend is te: {error}") from None
        if recipe.formats and device.type == "cuda":
            raise UsageError(_instead_of_emulating(error)) from None
        logger.info("without Transformer Engine: %s", error)
        return recipe
    how = " in MXFP8, tiles of 1x32" if recipe.formats and backend.library.microscaling else ""
    logger.info("with Transformer Engine %s%s", backend.library.version, how)
    return replace(recipe, backend=backend)


def _instead_of_emulating(fault: object) -> str:
    fault = str(fault).removesuffix(f"; {INSTEAD}")
    return (
        f"precision.recipe fp8 needs Transformer Engine on GPUs: {fault}. Set precision.recipe to bf16, or accept "
        "emulated FP8, several times slower than BF16, with precision.backend emulated"
    )


def backend_faults(config: Config, device: Literal["cpu", "cuda"] = "cpu") -> list[str]:
    """Reasons why no backend can be used on `device`, as far as they show before any rank has its GPU."""
    if config.precision.backend == "auto" and config.precision.formats() and device == "cuda":
        missing = version_fault()
        return [] if missing is None else [_instead_of_emulating(missing)]
    if config.precision.backend != "te":
        return []
    faults = [*_width_faults(config, HOPPER_ALIGNMENT)]
    missing = version_fault()
    if missing is not None:
        faults.append(f"{missing}; {INSTEAD}")
    if config.run.device == "cpu":
        faults.append(f"run.device is cpu, and Transformer Engine computes on NVIDIA GPUs; {INSTEAD}")
    return [f"precision.backend is te: {fault}" for fault in faults]


def _width_faults(config: Config, unit: int) -> Iterator[str]:
    for name, width in quantised_widths(config.model, config.precision.formats()).items():
        if width % unit:
            yield (
                f"{name} is {width}: Transformer Engine multiplies widths in multiples of {unit} in FP8 (nearest: "
                f"{nearest_multiples(width, unit)}); {INSTEAD}"
            )


def quantised_widths(model: ModelConfig, formats: Formats) -> dict[str, int]:
    """Widths of the matrices that `formats` quantise, by their keys in the configuration."""

    def quantised(*patterns: str) -> bool:
        return any(formats.get(f"{kind}.weight") for kind in KINDS if kind.startswith(patterns))

    heads, plain = model.num_attention_heads, model.qk_nope_head_dim
    widths: dict[str, int | None] = {}
    if quantised(""):
        widths["model.hidden_size"] = model.hidden_size
    if quantised("dense"):
        widths["model.intermediate_size"] = model.intermediate_size
    if quantised("shared", "experts"):
        widths["model.moe_intermediate_size"] = model.moe_intermediate_size
    if formats.get("attention.weight"):
        widths["model.q_lora_rank"] = model.q_lora_rank
        widths["model.kv_lora_rank"] = model.kv_lora_rank
        widths["model.kv_lora_rank + qk_rope_head_dim"] = model.kv_lora_rank + model.qk_rope_head_dim
        widths["model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)"] = heads * model.qk_head_dim
        widths["model.num_attention_heads x (qk_nope_head_dim + v_head_dim)"] = heads * (plain + model.v_head_dim)
    if formats.get("attention_out.weight"):
        widths["model.num_attention_heads x v_head_dim"] = heads * model.v_head_dim
    return {name: width for name, width in widths.items() if width is not None}
