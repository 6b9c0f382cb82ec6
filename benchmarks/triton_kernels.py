"""Fused FP8 kernels on a GPU, compared with the torch operations that each fuses, and with copying as many bytes.

    python -P benchmarks/triton_kernels.py [--rows 8192] [--rounds 30] [--no-compile]

DeepSeek-V3's widths: hidden 7168, inner 2048, eight experts per GPU, top 8. "eager" is the unfused sequence as torch
runs it, "compiled" the same sequence fused by torch.compile. "copy" moves as many bytes as the operation must read and
write: the memory's limit. All sides run in turn in one process, in the opposite order every other round, on inputs
larger than the L2 cache. A line shows the medians of all sides, and the median and quartiles of the rounds' ratios to
ours. Results are compared before the timing. Needs a GPU of compute capability 9.0 or above.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.comm.permute import order_by_expert
from counterflow.fp8 import triton as fused
from counterflow.fp8.quantize import BlockQuantized

HIDDEN, INNER, EXPERTS, TOP_K = 7168, 2048, 8, 8
Codes = tuple[Tensor, Tensor]  # codes and scales


def quantize(x: Tensor) -> Codes:
    """Codes and scales of x in tiles of (1, 128), with power-of-two scales."""
    tiles = x.float().unflatten(1, (-1, 128))
    amax = tiles.abs().amax(2, keepdim=True)
    multiplier = ((448.0 / amax).clamp(max=3.3895313892515355e38).view(torch.int32) & 0x7F800000).view(torch.float32)
    multiplier = torch.where(amax == 0, 1.0, multiplier)
    return (tiles * multiplier).to(torch.float8_e4m3fn).view(x.shape), multiplier.reciprocal().squeeze(2)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.float().unflatten(1, (-1, 128)) * scales[:, :, None]).flatten(1).bfloat16()


def quantize_columns(x: Tensor) -> Codes:
    """Transposed codes, and scales `[tiles, columns]`, in tiles of (128, 1). All tiles have 128 rows of one group."""
    codes, scales = quantize(x.t().contiguous())
    return codes, scales.t()


def swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up * weights[:, None]).bfloat16()


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, 1)
    grad_up, grad_silu = grad.float() * torch.nn.functional.silu(gate), grad.float() * up
    grad_weights = (grad_up * up).sum(1)
    factor = weights[:, None]
    grad_gate = torch.ops.aten.silu_backward(grad_silu * factor, gate)
    return torch.cat((grad_gate, grad_up * factor), 1).bfloat16(), grad_weights


@dataclass(frozen=True)
class Case:
    """A kernel and its unfused sequence, with the same arguments. `compare` gives the kernel's tensors to compare."""

    name: str
    fused: Callable[[], object]
    plain: Callable[..., tuple[Tensor, ...]]
    arguments: tuple[Tensor, ...]
    compare: Callable[[], tuple[Tensor, ...]]
    bytes_moved: int


def parts(*matrices: BlockQuantized) -> tuple[Tensor, ...]:
    return tuple(
        t for q in matrices for t in ((q.data.mT if q.tile == (128, 1) else q.data).view(torch.uint8), q.scale)
    )


def as_bytes(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors)


def swiglu_cases(rows: int) -> list[Case]:
    gate_up, grad, weights = random(rows, 2 * INNER), random(rows, INNER), torch.rand(rows, device="cuda")
    cached = BlockQuantized(*quantize(gate_up), (1, 128), "e4m3", 2 * INNER, True)
    groups = fused.group_rows(range(rows // EXPERTS, rows + 1, rows // EXPERTS), "cuda")

    def keeping() -> tuple[Tensor, ...]:
        hidden, kept = fused.swiglu_keeping(gate_up, weights)
        return *parts(kept), hidden

    def backward(given: Tensor | BlockQuantized) -> tuple[Tensor, ...]:
        gradient, grad_weights = fused.swiglu_backward(grad, given, weights)
        assert grad_weights is not None
        return gradient, grad_weights

    one = rows * INNER  # numbers of one side
    return [
        Case(
            "SwiGLU, keeping",
            lambda: fused.swiglu_keeping(gate_up, weights),
            lambda g, w: (*quantize(g), swiglu(g, w)),
            (gate_up, weights),
            keeping,
            8 * one,
        ),
        Case(
            "SwiGLU, cached",
            lambda: fused.swiglu(cached, weights),
            lambda c, s, w: (swiglu(dequantize(c, s), w),),
            (cached.data, cached.scale, weights),
            lambda: (fused.swiglu(cached, weights),),
            4 * one,
        ),
        Case(
            "SwiGLU for W, cached",
            lambda: fused.swiglu_quantize_columns(cached, weights, groups),
            lambda c, s, w: quantize_columns(swiglu(dequantize(c, s), w)),
            (cached.data, cached.scale, weights),
            lambda: parts(fused.swiglu_quantize_columns(cached, weights, groups)),
            3 * one,
        ),
        Case(
            "SwiGLU backward",
            lambda: fused.swiglu_backward(grad, gate_up, weights),
            swiglu_backward,
            (grad, gate_up, weights),
            lambda: backward(gate_up),
            10 * one,
        ),
        Case(
            "SwiGLU backward, cached",
            lambda: fused.swiglu_backward(grad, cached, weights),
            lambda g, c, s, w: swiglu_backward(g, dequantize(c, s), w),
            (grad, cached.data, cached.scale, weights),
            lambda: backward(cached),
            8 * one,
        ),
    ]


def other_cases(rows: int) -> list[Case]:
    x, tokens = random(rows, HIDDEN), random(rows // 2, HIDDEN)
    count = tokens.shape[0]
    order = order_by_expert(torch.rand(count, 256, device="cuda").argsort(1)[:, :TOP_K].contiguous(), 256)
    cached = BlockQuantized(*quantize(x), (1, 128), "e4m3", HIDDEN, True)
    groups = fused.group_rows(range(rows // EXPERTS, rows + 1, rows // EXPERTS), "cuda")
    sent = count * TOP_K
    size = fused.message_bytes(HIDDEN)

    def plain_message(tokens: Tensor, token_of_row: Tensor) -> tuple[Tensor, ...]:
        codes, scales = quantize(tokens)
        message = torch.cat((codes.view(torch.uint8), scales.contiguous().view(torch.uint8)), 1)
        return (message.index_select(0, token_of_row),)

    return [
        Case(
            "both tilings",
            lambda: fused.quantize_both(x, groups),
            lambda x: (*quantize(x), *quantize_columns(x)),
            (x,),
            lambda: parts(*fused.quantize_both(x, groups)),
            4 * x.numel(),
        ),
        Case(
            "requantise",
            lambda: fused.requantize_columns(cached, groups),
            lambda c, s: quantize_columns(dequantize(c, s)),
            (cached.data, cached.scale),
            lambda: parts(fused.requantize_columns(cached, groups)),
            2 * x.numel(),
        ),
        Case(
            "dispatch",
            lambda: fused.quantize_for_dispatch(tokens, order.row_of_slot, sent),
            plain_message,
            (tokens, order.token_of_row),
            lambda: (fused.quantize_for_dispatch(tokens, order.row_of_slot, sent),),
            2 * tokens.numel() + sent * size,
        ),
    ]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def compare(case: Case) -> None:
    """Stop with a message where results differ by more than exp's last bits and the order of sums explain."""
    for ours, theirs in zip(case.compare(), as_bytes(case.plain(*case.arguments)), strict=True):
        assert ours.shape == theirs.shape, f"{case.name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
        if ours.dtype == torch.uint8:
            share = (ours != theirs).float().mean().item()
            limit = 1e-3 if "SwiGLU" in case.name else 0.0
            if share > limit:
                sys.exit(f"{case.name}: {share:.2%} of the codes differ from the unfused operations'")
        elif "SwiGLU" in case.name and ours.dim() == 2:  # scales: an amax may round differently
            share = (ours != theirs).float().mean().item()
            if share > 1e-3:
                sys.exit(f"{case.name}: {share:.2%} of the scales differ from the unfused operations'")
        else:
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=1e-2)


def milliseconds(side: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    side()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, rounds: int, compiled: bool) -> str:
    source = torch.empty(case.bytes_moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    sides: list[Callable[[], object]] = [
        case.fused,
        lambda: case.plain(*case.arguments),
        lambda: target.copy_(source),
    ]
    if compiled:
        plain = torch.compile(case.plain, dynamic=False)
        sides.append(lambda: plain(*case.arguments))
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 5):  # the first five compile and warm up
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for index in order:
            times[index].append(milliseconds(sides[index]))
    own = times[0][5:]
    line = f"{case.name:24} {statistics.median(own):8.3f}"
    for other in times[1:]:
        ratios = [a / b for a, b in zip(other[5:], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        line += f"  {statistics.median(other[5:]):8.3f} {middle:5.2f} [{low:.2f}, {high:.2f}]"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows at the experts of a GPU, a multiple of 1024")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: these kernels are compiled and checked without one by tests/fp8, but not timed")
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        sys.exit(f"compute capability {capability[0]}.{capability[1]} has no E4M3 conversions: 9.0 or above is needed")
    if options.rows % 1024 or options.rows <= 0:
        sys.exit(f"--rows {options.rows} does not divide into {EXPERTS} groups of whole tiles: take a multiple of 1024")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.rows} rows, {options.rounds} rounds")
    print(f"{'':24}  ours ms  eager ms / ours           copy ms  / ours" + " " * 12 + "compiled ms / ours")
    for case in (*swiglu_cases(options.rows), *other_cases(options.rows)):
        compare(case)
        print(measure(case, options.rounds, not options.no_compile), flush=True)


if __name__ == "__main__":
    main()
