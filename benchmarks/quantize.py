"""Block quantisation on a CPU: ours compared with a plain vectorised one, and with copying as many bytes.

    python -P benchmarks/quantize.py [--threads 2] [--rounds 20]

Numbers are BF16, and are quantised to E4M3 with power-of-two scales. "plain" runs PyTorch's own operations and casts
on whole tensors, with the same bits as the result. "copy" is `Tensor.copy_` of as many bytes as the operation must read
and write (three per number, or four for fake-quantising): the memory's limit. All sides run in turn in one process. A
line shows the medians of all sides, and the median and quartiles of the rounds' ratios to ours.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.fp8.quantize import fake_quantize, quantize, quantize_with_values

Tile = tuple[int, int]
Side = Callable[[], object]
SHAPES = ((2048, 512), (8192, 1024), (4096, 7168))  # tokens x width, the last as V3's
TILES: tuple[Tile, ...] = ((1, 128), (128, 1), (128, 128))


def plain_quantize(x: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, whose sides are multiples of the tile's. Scales are shaped to broadcast."""
    tiles = x.float().unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    amax = tiles.abs().amax((1, 3), keepdim=True)
    multiplier = (torch.tensor(448.0) / amax).clamp(max=torch.finfo(x.dtype).max)
    multiplier = torch.where(amax == 0, 1.0, torch.exp2(torch.frexp(multiplier).exponent - 1.0))
    data = (tiles * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
    return data.view(x.shape), multiplier.reciprocal()


def plain_dequantize(data: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    tiles = data.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    return (tiles.float() * scale).bfloat16().view(data.shape)


def operations(x: Tensor, tile: Tile) -> dict[str, tuple[Side, Side, Side]]:
    """Our operation, the plain one and the copy, by name of the operation."""
    ours, (data, scale) = quantize(x, tile), plain_quantize(x, tile)
    assert torch.equal(data.view(torch.uint8), ours.data.view(torch.uint8))
    assert torch.equal(plain_dequantize(data, scale, tile), ours.dequantize())

    def plain_both() -> object:
        made = plain_quantize(x, tile)
        return made, plain_dequantize(*made, tile)

    def copy(bytes_per_number: int) -> Side:
        source = torch.zeros(x.numel() * bytes_per_number // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def plain_fake() -> Tensor:
        return plain_dequantize(*plain_quantize(x, tile), tile)

    return {
        "quantise": (lambda: quantize(x, tile), lambda: plain_quantize(x, tile), copy(3)),
        "dequantise": (ours.dequantize, lambda: plain_dequantize(data, scale, tile), copy(3)),
        "fake-quantise": (lambda: fake_quantize(x, tile), plain_fake, copy(4)),
        "quantise, values too": (lambda: quantize_with_values(x, tile), plain_both, copy(5)),
    }


def seconds(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def keep_freed_memory() -> None:
    """Stop glibc from returning memory: page faults of new memory, equal on all sides, would hide the difference."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def ratio(theirs: list[float], own: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(theirs, own, strict=True)], n=4)
    return f"{1e3 * statistics.median(theirs):9.2f}  {middle:5.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    print("shape        tile         operation               ours ms  ns/number   plain ms  / ours   copy ms  / ours")
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator).bfloat16()
        for tile in TILES:
            for name, sides in operations(x, tile).items():
                times: list[list[float]] = [[], [], []]
                for number in range(options.rounds + 2):  # the first two warm up
                    for index in ((0, 1, 2), (2, 1, 0))[number % 2]:
                        times[index].append(seconds(sides[index]))
                own, plain, copied = (each[2:] for each in times)
                middle = statistics.median(own)
                print(
                    f"{shape[0]:5} x {shape[1]:4} {tile!s:12} {name:21}"
                    f"{1e3 * middle:9.2f} {1e9 * middle / x.numel():10.2f}  {ratio(plain, own)}  {ratio(copied, own)}"
                )


if __name__ == "__main__":
    main()
