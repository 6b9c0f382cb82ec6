"""Functions for tests of Triton kernels, in separate processes: the interpreter is chosen before Triton is imported.

`interpreted` runs the public functions on CPU tensors under Triton's interpreter, whose conversions between formats
are replaced by `convert_float`. `compiled` makes machine code of them without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterflow.fp8 import triton as fused
from counterflow.fp8.quantize import BlockQuantized
from counterflow.kernels.launch import Launch
from counterflow.tests.fp8.tiling import code_values

Bits = NDArray[np.uint32]


def bf16_of(bits: Bits) -> Bits:
    """BF16 nearest to the FP32 numbers with these bits, ties to even."""
    # Among positive numbers bits count steps: a carry out of the mantissa is the next exponent, and infinity the last.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(bits & 0x7FFFFFFF > 0x7F800000, bits >> 16 | 0x40, rounded)


def e4m3_of(bits: Bits) -> Bits:
    """E4M3 nearest to the FP32 numbers with these bits, ties to even, saturated; all NaN are 0x7F, as on a GPU."""
    magnitude = bits & 0x7FFFFFFF
    normal = np.minimum(magnitude, 0x7F800000) + 0x7FFFF + (magnitude >> 20 & 1) >> 20  # exponents are biased by 127
    subnormal = magnitude < 0x3C800000  # below 2^-6 in steps of 2^-9
    steps = np.rint(np.where(subnormal, magnitude, 0).view(np.float32) * np.float32(512)).astype(np.uint32)
    codes = np.where(subnormal, steps, normal - 8 * 120)
    codes = np.where(magnitude > 0x7F800000, 0x7F, np.minimum(codes, 0x7E) | bits >> 24 & 0x80)
    return codes.astype(np.uint32)


E4M3_VALUES = code_values("e4m3").float().numpy()


def convert_float(data: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
    """Replacement of the function of this name in triton/runtime/interpreter.py, which truncates or drops carries."""
    way = source.name, target.name
    if way == ("fp32", "bf16"):
        return bf16_of(data.view(np.uint32)).astype(np.uint16)
    if way == ("fp32", "fp16"):
        return data.view(np.float32).astype(np.float16).view(np.uint16)
    if way == ("fp16", "fp32"):
        return data.view(np.float16).astype(np.float32).view(np.uint32)
    if way == ("fp32", "fp8e4nv"):
        return e4m3_of(data.view(np.uint32)).astype(np.uint8)
    if way == ("bf16", "fp32"):
        return data.view(np.uint16).astype(np.uint32) << 16
    assert way == ("fp8e4nv", "fp32"), way
    return E4M3_VALUES[data.view(np.uint8)].view(np.uint32)


def prepare_interpreter() -> None:
    """Prepare a new process for the interpreter, before it imports Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    module: Any = importlib.import_module("triton.runtime.interpreter")
    module._convert_float = convert_float
    language: Any = importlib.import_module("triton.language.core")
    patch, done = module._patch_lang, set()

    def patch_once(function: Any) -> Any:
        """Patch once. Triton patches its language at every call of every function, which takes most of the time."""
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            patch(function)  # its result could undo the patch
            # Triton 3.6 leaves the number in an array of one dimension, which NumPy 2.4 makes no index of.
            language.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return module._LangPatchScope()

    module._patch_lang = patch_once
    np.seterr(all="ignore")


def interpreted(name: str, *arguments: Any, in_one_block: bool = False) -> Any:
    """A public function of `fp8.triton` by its name, under the interpreter.

    `in_one_block` computes a tile in one piece: the interpreter's time per piece does not depend on the size.
    """
    run = Launch.run
    if in_one_block:
        Launch.run = lambda launch: run(replace(launch, constants=launch.constants | {"block": 128}))  # type: ignore[method-assign]
    try:
        return (flag_of if name == "flag_of" else getattr(fused, name))(*arguments)
    finally:
        Launch.run = run  # type: ignore[method-assign]


def flag_of(name: str, *arguments: Any) -> int:
    """The flag that a public function sets where it meets infinities or NaN."""
    met = torch.zeros(1, dtype=torch.int32)
    getattr(fused, name)(*arguments, met=met)
    return int(met)


_TRITON_CAME_ALONG = "triton" in sys.modules


def importing_ours_imported_triton() -> bool:
    """Whether Triton was imported after this process had imported `fp8.triton` and no other user of Triton."""
    return _TRITON_CAME_ALONG


def prepare_compiler(cache: str) -> None:
    """Prepare a new process to compile, before it imports Triton. `cache` is empty: cached kernels are not compiled."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Compiled:
    """A kernel's code for one target, and the assembler's report on it."""

    case: str
    kernel: str
    target: str
    warps: int
    registers: int  # per thread
    spilled_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int  # per program
    ptx: str


def compiled(case: str, capability: int) -> list[Compiled]:
    """The kernels that a case launches, compiled for that compute capability times ten."""
    launches: list[Launch] = []
    Launch.run = lambda launch: launches.append(launch)  # type: ignore[method-assign]
    CASES[case]()
    return [compile_launch(case, launch, capability) for launch in launches]


def compile_launch(case: str, launch: Launch, capability: int) -> Compiled:
    """Compile a kernel as a launch with these arguments does: specialised for ones and for divisibility by 16."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    backend = importlib.import_module("triton.backends.compiler")
    names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8"}
    names |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
    signature: dict[str, str] = {}
    known: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    assert sorted(given) == sorted(launch.kernel.arg_names), (case, list(given), launch.kernel.arg_names)
    every = {name: given[name] for name in launch.kernel.arg_names}
    for index, (name, value) in enumerate(every.items()):
        if name in launch.constants or (isinstance(value, int) and value == 1):
            signature[name], known[index,] = "constexpr", value
        else:
            number = "fp32" if isinstance(value, float) else "i32"
            signature[name] = f"*{names[value.dtype]}" if isinstance(value, Tensor) else number
            unknown = isinstance(value, float) or launch.kernel.params[index].do_not_specialize
            if isinstance(value, Tensor) or not (unknown or value % 16):
                attributes[index,] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(launch.kernel, signature=signature, constexprs=known, attrs=attributes)
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(
            source,
            target=backend.GPUTarget("cuda", capability, 32),
            options=launch.options,
        )
    text = log.getvalue()

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    assert "Used" in text, f"the assembler's log of {case} is missing: {text!r}"
    return Compiled(
        case,
        launch.kernel.__name__,
        re.search(r"for '(\w+)'", text)[1],  # type: ignore[index]
        launch.num_warps,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill"),
        number(r"(\d+) bytes stack"),
        made.metadata.shared,
        made.asm["ptx"],
    )


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _cached(rows: int, width: int, pow2: bool = True) -> BlockQuantized:
    codes, scales = _meta(rows, width, dtype=torch.float8_e4m3fn), _meta(rows, -(-width // 128), dtype=torch.float32)
    return BlockQuantized(codes, scales, (1, 128), "e4m3", width, pow2)


def _packed(rows: int, width: int) -> BlockQuantized:
    codes = _meta(rows, width + width // 2, dtype=torch.uint8)
    return BlockQuantized(codes, _meta(rows, width // 128, dtype=torch.float32), (1, 128), "e5m6", width, True)


def _flag() -> Tensor:
    return _meta(1, dtype=torch.int32)


def _groups() -> fused.RowGroups:
    return fused.group_rows(range(1024, 8193, 1024), "meta")


# V3: 8 experts per GPU, hidden 7168, inner 2048, top 8. 1040 is an inner width that 128 does not divide.
ROWS, HIDDEN, INNER, TOKENS, TOP_K = 8192, 7168, 2048, 4096, 8


def _weights() -> Tensor:
    return _meta(ROWS, dtype=torch.float32)


def _slots(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int64)


CASES: dict[str, Callable[[], object]] = {
    "SwiGLU, keeping": lambda: fused.swiglu_keeping(_meta(ROWS, 2 * INNER), _weights(), met=_flag()),
    "SwiGLU, cached": lambda: fused.swiglu(_cached(ROWS, 2 * INNER), _weights()),
    "SwiGLU, cached, uneven": lambda: fused.swiglu(_cached(ROWS, 2080)),
    "SwiGLU for W, cached": lambda: fused.swiglu_quantize_columns(_cached(ROWS, 2 * INNER), _weights(), _groups()),
    "SwiGLU backward": lambda: fused.swiglu_backward(_meta(ROWS, INNER), _meta(ROWS, 2 * INNER), _weights()),
    "SwiGLU backward, cached": lambda: fused.swiglu_backward(_meta(ROWS, INNER), _cached(ROWS, 2 * INNER), _weights()),
    "SwiGLU backward, cached, uneven": lambda: fused.swiglu_backward(_meta(ROWS, 1040), _cached(ROWS, 2080)),
    "both tilings": lambda: fused.quantize_both(_meta(ROWS, HIDDEN), _groups()),
    "both tilings, FP32 scales, odd groups": lambda: fused.quantize_both(
        _meta(ROWS, HIDDEN), fused.group_rows((1001, ROWS), "meta"), False
    ),
    "requantise": lambda: fused.requantize_columns(_cached(ROWS, HIDDEN), _groups()),
    "requantise, FP32 scales": lambda: fused.requantize_columns(_cached(ROWS, HIDDEN, False)),
    "dispatch": lambda: fused.quantize_for_dispatch(_meta(TOKENS, HIDDEN), _slots(TOKENS, TOP_K), TOKENS * TOP_K),
    "dispatch, one row per token": lambda: fused.quantize_for_dispatch(_meta(TOKENS, HIDDEN), met=_flag()),
    "rows": lambda: fused.quantize_rows(_meta(ROWS, HIDDEN), met=_flag()),
    "rows, FP32 scales": lambda: fused.quantize_rows(_meta(ROWS, HIDDEN, dtype=torch.float32), pow2_scales=False),
    "rows in E5M6": lambda: fused.quantize_rows(_meta(ROWS, 16384), "e5m6", met=_flag()),
    "restored rows": lambda: fused.dequantize_rows(_cached(ROWS, HIDDEN), torch.bfloat16),
    "restored rows of E5M6": lambda: fused.dequantize_rows(_packed(ROWS, 16384), torch.bfloat16),
}
