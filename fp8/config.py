"""The `precision` section of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from ..settings import Clash, Section, SectionFaults, key
from .tensor_formats import CLASSES, Formats, TensorFormat, v3_formats

if TYPE_CHECKING:
    from .recipe import Recipe


class ClassConfig(Section):
    """Format of the tensors of a class. Keys that are not given stay as in the recipe."""

    format: Literal["high", "e4m3", "e5m2", "e5m6"] | None = key(
        None, "number format; high is not quantised, e5m6 (twelve bits) is for caches"
    )
    tile: Literal["1x128", "128x128"] | None = key(
        None, "elements that share a scale; 1x128 lies along the contraction"
    )
    scales: Literal["pow2", "fp32"] | None = key(None, "powers of two, or any FP32 number")


class PrecisionConfig(Section):
    """Number formats of training. Master weights and gradient accumulation are FP32 in every recipe."""

    recipe: Literal["bf16", "fp32", "fp8"] = key(
        "bf16", "format of the matrix products: fp8 is DeepSeek-V3's fine-grained mixed precision (V3 §3.3)"
    )
    high: Literal["bf16", "fp32"] = key("bf16", "with recipe fp8, format of weights and of all that is not quantised")
    scales: Literal["pow2", "v3"] = key(
        "pow2", "with recipe fp8: scales are powers of two everywhere, or where V3 has them and FP32 elsewhere"
    )
    products: Literal["fast", "promoted"] = key(
        "fast", "emulated FP8 products: of dequantised values, or every 128 elements promoted to FP32 (slow)"
    )
    cpu_products: Literal["auto", "native", "widened"] = key(
        "auto",
        "BF16 products on a CPU: native, or widened to FP32 and rounded once, which is far faster without BF16 "
        "instructions; auto decides by the CPU's flags",
    )
    backend: Literal["auto", "emulated", "te"] = key(
        "auto",
        "what computes on a GPU: te is NVIDIA's Transformer Engine, for FP8 products, attention and the optimizer's "
        "update; emulated needs neither; auto takes te where it can do all that is asked",
    )
    classes: dict[str, ClassConfig] = key(
        {}, "with recipe fp8, other formats by class of tensors, such as `*.gradient: {tile: 128x128}`; the last wins"
    )

    @model_validator(mode="after")
    def _classes_exist(self) -> PrecisionConfig:
        clashes = [*self._clashes()]
        if clashes:
            raise SectionFaults(clashes)
        return self

    @property
    def format(self) -> Literal["bf16", "fp32"]:
        """Format of weights, and of activations that are not quantised."""
        return self.high if self.recipe == "fp8" else self.recipe

    def formats(self) -> Formats:
        """The format of every class of tensors; none with a recipe that quantises nothing."""
        if self.recipe != "fp8":
            return {}
        formats = v3_formats(self.scales)
        for pattern, given in self.classes.items():
            for name in fnmatch_classes(pattern):
                formats[name] = _changed(formats[name] or v3_formats(self.scales)[name], given)
        return formats

    def make(self) -> Recipe:
        """Return the recipe of the model's layers, with emulated FP8. The caller adds a backend."""
        from .products import Products  # a configuration is read without torch
        from .recipe import Recipe

        return Recipe(self.formats(), self.products, products=Products.choose(self.cpu_products))

    def _clashes(self) -> Iterator[Clash]:
        if self.classes and self.recipe != "fp8":
            yield Clash(("classes", "recipe"), f"is for recipe fp8, and the recipe is {self.recipe}")
        for pattern, given in self.classes.items():
            names = fnmatch_classes(pattern)
            if not names:
                close = get_close_matches(pattern, CLASSES, 3, 0.5) or CLASSES[:3]
                yield Clash((f"classes.{pattern}",), f"names no class of tensors (nearest: {', '.join(close)})")
            others = [name for name in names if not name.endswith(".cache")]
            if given.format == "e5m6" and others:
                message = f"e5m6 is a format of caches, and this names {others[0]}"
                yield Clash((f"classes.{pattern}.format",), message)
        if self.backend == "te":
            for keys, fault in self.te_faults():
                yield Clash(("backend", *keys), f"te does not go with this: {fault}")

    def te_faults(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Faults of this section for Transformer Engine on any GPU: the keys that cause them, and the reasons."""
        from .te.limits import faults

        if self.format == "fp32":
            key = "high" if self.recipe == "fp8" else "recipe"
            yield (key,), f"{key} is fp32: Transformer Engine is for weights and activations in BF16"
        if self.recipe == "fp8" and self.products == "promoted":
            yield ("products",), "products are promoted: that is a way to emulate them, te computes on tensor cores"
        for fault in faults(self.formats()):
            yield ("classes",), fault


def fnmatch_classes(pattern: str) -> list[str]:
    """Classes of tensors that match a pattern as in a shell: `experts_*.input`."""
    return [name for name in CLASSES if fnmatchcase(name, pattern)]


def _changed(format: TensorFormat | None, given: ClassConfig) -> TensorFormat | None:
    if given.format == "high" or format is None:
        return None
    return TensorFormat(
        given.format or format.fmt,
        format.square if given.tile is None else given.tile == "128x128",
        format.pow2 if given.scales is None else given.scales == "pow2",
    )
