"""NVIDIA's Transformer Engine as installed on this machine, or the reason why it cannot be used.

Versions are read without importing: without its compiled parts the package raises at the import, and PyPI's first
wheel of this name is such a package. Everything that is refused runs with `precision.backend: emulated`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from ...settings import UsageError
from .limits import INSTEAD

if TYPE_CHECKING:
    import torch

OLDEST = (2, 9)  # te.autocast, is_fp8_block_scaling_available and MXFP8 products for block scaling on Blackwell
CHECKED = "2.20.2"
"""The release whose signatures every call was checked against (tests/fp8/te_signatures.json)."""

HOPPER_ALIGNMENT, BLACKWELL_ALIGNMENT = 16, 32
"""Divisors of the sizes of matrices: cuBLAS reads FP8 in 16 bytes, and MXFP8 has tiles of 32."""


@dataclass(frozen=True)
class Library:
    """Imported modules of Transformer Engine, and the GPU on which they compute."""

    pytorch: ModuleType
    """`transformer_engine.pytorch`"""
    recipe: ModuleType
    """`transformer_engine.common.recipe`"""
    version: str
    capability: tuple[int, int]
    """Compute capability of the GPU: (9, 0) is Hopper."""

    @property
    def microscaling(self) -> bool:
        """Whether the GPU multiplies in MXFP8, as Blackwell does: block scaling is then emulated with MXFP8."""
        return self.capability >= (10, 0)

    @property
    def alignment(self) -> int:
        """Number that divides all widths, and the rows too, because the weight's gradient contracts rows."""
        return BLACKWELL_ALIGNMENT if self.microscaling else HOPPER_ALIGNMENT


def find_version() -> str | None:
    """The installed version; None without the package. Imports nothing."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


def version_fault() -> str | None:
    """Fault of the installed version; None without a fault. Imports nothing."""
    found, oldest = find_version(), ".".join(map(str, OLDEST))
    if found is None:
        return (
            f"Transformer Engine >= {oldest} is not installed "
            "(pip install --no-build-isolation 'transformer-engine[pytorch]')"
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST:
        return f"Transformer Engine {found} is installed, and {oldest} is the oldest that works"
    return None


STAND_INS: dict[str, Library] = {}
"""Libraries that take Transformer Engine's place on a type of device, such as the meta device of a dry run."""


def load(device: torch.device) -> Library:
    """Transformer Engine for FP8 on `device`; raises UsageError that names an unsupported version or architecture."""
    if device.type in STAND_INS:
        return STAND_INS[device.type]
    fault = version_fault()
    if fault is not None:
        raise UsageError(f"{fault}; {INSTEAD}")
    if device.type != "cuda":
        raise UsageError(f"Transformer Engine computes on NVIDIA GPUs, and this rank's device is {device}; {INSTEAD}")
    try:
        pytorch = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # RuntimeError without the compiled parts, OSError without their libraries, and others
        reason = str(error).strip().splitlines()
        message = f"Transformer Engine {find_version()} is installed but cannot be imported"
        raise UsageError(f"{message}: {reason[0] if reason else type(error).__name__}; {INSTEAD}") from error
    import torch

    found = Library(pytorch, recipe, find_version() or "", torch.cuda.get_device_capability(device))
    fault = architecture_fault(found)
    if fault is not None:
        raise UsageError(f"{fault}; {INSTEAD}")
    return found


def architecture_fault(library: Library) -> str | None:
    """Reason why the GPU or its CUDA cannot compute fine-grained FP8; None if they can."""
    major, minor = library.capability
    gpu = f"this GPU has compute capability {major}.{minor}"
    if library.capability < (9, 0):
        return f"FP8 in tiles needs compute capability 9.0 (Hopper) or 10.x (Blackwell), and {gpu}"
    if major >= 12:
        return f"{gpu}, on which training in FP8 tiles was seen not to converge (Transformer Engine issue 2382)"
    if library.microscaling:
        available, reason = library.pytorch.is_mxfp8_available(return_reason=True)
        what = "MXFP8"
    else:
        available, reason = library.pytorch.is_fp8_block_scaling_available(return_reason=True)
        what = "FP8 block scaling"
    if available:
        return None
    import torch

    return f"Transformer Engine {library.version} has no {what} here (CUDA {torch.version.cuda}, {gpu}): {reason}"
