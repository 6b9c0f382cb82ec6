"""Matrix products of a model, and the way in which a CPU multiplies BF16 operands.

A CPU without BF16 instructions (x86 before Sapphire Rapids and Zen 4, ARM before ARMv8.6) multiplies BF16 far slower
than FP32: at a fourth of its speed with AVX-512, and at a third to a fiftieth with AVX2. There the operands are widened
to FP32, which is exact, multiplied in FP32, and the result is rounded to BF16 once. A native product also sums in FP32
and rounds once, so the two products differ in the order of the sum alone.

Products of other formats, and products on other devices, are always PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CpuProducts = Literal["auto", "native", "widened"]

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Capabilities of a CPU that multiply BF16, by torch's names: two of x86 and two of ARM."""
ISA_LIMITS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
"""Parts of the values of ONEDNN_MAX_CPU_ISA that leave oneDNN its BF16 instructions."""


def cpu_capabilities() -> Mapping[str, Any]:
    """Instruction sets of this CPU by torch's names."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


def multiplies_bf16(capabilities: Mapping[str, Any], isa_limit: str = "") -> bool:
    """Whether a CPU has instructions for products of BF16, and oneDNN may use them.

    `isa_limit` is the value of ONEDNN_MAX_CPU_ISA, which hides instructions of an x86 CPU from oneDNN.
    """
    allowed = not isa_limit or any(part in isa_limit.upper() for part in ISA_LIMITS)
    return allowed and any(bool(capabilities.get(name)) for name in INSTRUCTIONS)


def widens_here(isa_limit: str = "") -> bool:
    """Whether `auto` widens on this machine. The same CPU and `isa_limit` always give the same answer."""
    return not multiplies_bf16(cpu_capabilities(), isa_limit)


@dataclass(frozen=True)
class Products:
    """Matrix products; BF16 operands on a CPU are widened to FP32 first where `widened` is set."""

    widened: bool = field(default_factory=widens_here)

    @classmethod
    def choose(cls, setting: CpuProducts = "auto", isa_limit: str = "") -> Products:
        """Products by the key `precision.cpu_products`; `auto` follows this machine's CPU."""
        return cls(widens_here(isa_limit) if setting == "auto" else setting == "widened")

    def __str__(self) -> str:
        return "widened to FP32" if self.widened else "native"

    def widens(self, operand: Tensor) -> bool:
        """Whether a product of `operand` with another tensor of its type is computed in FP32."""
        return self.widened and operand.dtype == torch.bfloat16 and operand.device.type == "cpu"

    def computes_in(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """Type in which operands of type `dtype` are multiplied on `device`."""
        return torch.float32 if self.widened and device.type == "cpu" and dtype == torch.bfloat16 else dtype

    def multiply(
        self, a: Tensor, b: Tensor, offsets: Tensor | None = None, ends: Sequence[int] | None = None
    ) -> Tensor:
        """`a b` of a `[..., M, K]` and b `[..., K, N]`, in their format.

        `offsets` `[E]` are the ends of groups. Either the rows of a `[R, K]` are grouped, one group per matrix of b
        `[E, K, N]`, and the result is `[R, N]`; or the contraction of a `[M, R]` and b `[R, N]` is grouped, and the
        result is `[E, M, N]`. `ends` are `offsets` on the host, copied from the device where they are needed and not
        given: for products in FP32.
        """
        if offsets is not None:
            return self._grouped(a, b, offsets, ends)
        if self.widens(a):
            return torch.matmul(a.float(), b.float()).to(a.dtype)
        return torch.matmul(a, b)

    def _grouped(self, a: Tensor, b: Tensor, offsets: Tensor, ends: Sequence[int] | None) -> Tensor:
        # Off the CPU torch's grouped product is for BF16. For FP32 it copies the offsets to the host every time.
        if not self.widens(a) and (a.device.type == "cpu" or a.dtype == torch.bfloat16):
            if a.shape[0 if b.dim() == 3 else 1] == 0:  # no row at all: CUDA's kernel would read from no memory
                return a.new_zeros(*offsets.shape[: 3 - b.dim()], a.shape[0], b.shape[-1])
            return F.grouped_mm(a, b, offs=offsets)
        groups = [slice(start, stop) for start, stop in pairwise((0, *(offsets.tolist() if ends is None else ends)))]
        # One group at a time: there is no FP32 copy of all experts, and the copy of one expert stays in the cache.
        if b.dim() == 3:
            rows = a.new_empty(a.shape[0], b.shape[-1])
            for index, group in enumerate(groups):
                rows[group] = torch.mm(a[group].float(), b[index].float())
            return rows
        stack = a.new_empty(len(groups), a.shape[0], b.shape[-1])
        for index, group in enumerate(groups):
            stack[index] = torch.mm(a[:, group].float(), b[group].float())
        return stack
