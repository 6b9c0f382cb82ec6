"""Time forward and backward of one micro-batch, ours and other implementations', in one process, in turn.

    python benchmarks/step.py [--rounds 7] [--threads 2] [--precision bf16] [--compile] [--profile FILE]

All sides have the same architecture, token ids and number format, and the same number of threads. transformers'
DeepseekV3ForCausalLM is timed with each attention and experts implementation that suits a CPU. torchtitan's
DeepSeekV3Model is timed where it can be imported (`pip install --no-deps --target DIR torchtitan==0.3.0 tyro
docstring_parser spmd_types`, then PYTHONPATH=DIR). Prints tokens/s of every side, the ratio of medians to the fastest
of each library with its spread over rounds, and MFU against the peak of a 2048-cubed matmul timed between the rounds (6
FLOPs per parameter and token plus attention without causal discount).

On a machine with other work `--clock cpu --threads 1` counts this process's processor time. `--batch` and `--length`
make the micro-batch smaller, for CPUs that multiply BF16 slowly.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from counterflow.benchmarks.others import TRANSFORMERS, torchtitan_step, transformers_step
from counterflow.comm.flat import FlatDispatcher
from counterflow.fp8.number_formats import DTYPES
from counterflow.fp8.products import Products
from counterflow.fp8.recipe import Recipe
from counterflow.model.config import ModelConfig
from counterflow.model.counts import FLOP_CONVENTION, flops_per_token
from counterflow.model.kernels import Kernels
from counterflow.model.naming import initialise
from counterflow.model.transformer import Transformer

ARCHITECTURE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1280,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 512,
}
BATCH, LENGTH = 4, 512
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def ours(
    tokens: torch.Tensor, compile: bool, dtype: torch.dtype = torch.bfloat16, products: Products | None = None
) -> Callable[[], None]:
    """One forward and backward of our model; gradients are dropped between steps."""
    config = ModelConfig(**ARCHITECTURE, num_nextn_predict_layers=0)
    experts, count = config.n_routed_experts, tokens[:, 1:].numel()
    model = Transformer(
        config,
        FlatDispatcher(None, experts),
        range(experts),
        kernels=Kernels.make(compile),
        recipe=Recipe(products=products or Products()),
    )
    initialise(model, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        out = model(tokens)
        (out.loss / count + 1e-4 / len(tokens) * out.balance).backward()

    return step


def peak_flops(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of one 2048-cubed matmul."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    products = Products()
    seconds = min(timed(lambda: products.multiply(a, b), clock) for _ in range(3))
    return 2 * 2048**3 / seconds


def timed(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    step()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of the micro-batch")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--cpu-products", choices=("auto", "native", "widened"), default="auto")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu counts this process's processor time")
    parser.add_argument("--compile", action="store_true", help="also time our kernels fused by torch.compile")
    parser.add_argument("--profile", metavar="FILE", help="profile our step instead: a table here, a trace to FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, dtype = CLOCKS[args.clock], DTYPES[args.precision]
    products = Products.choose(args.cpu_products, os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ARCHITECTURE["vocab_size"], (args.batch, args.length + 1), generator=generator)
    if args.profile:
        profile(ours(tokens, args.compile, dtype, products), args.profile)
        return
    print(f"BF16 products of this CPU: {'widened to FP32' if products.widened else 'native'}", flush=True)
    sides = make_sides(tokens, dtype, products, args.compile)
    for step in sides.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for turn in range(args.rounds):
        peaks.append(peak_flops(dtype, clock))
        for name, step in list(sides.items())[:: 1 if turn % 2 else -1]:
            if args.clock == "wall":
                step()  # not timed: heap and caches are still in the state of the side before
            seconds[name].append(timed(step, clock))
    report(seconds, statistics.median(peaks), args.batch, args.length)


def make_sides(
    tokens: torch.Tensor, dtype: torch.dtype, products: Products, compile: bool
) -> dict[str, Callable[[], None]]:
    """The steps to compare, by name."""
    sides = {"counterflow": ours(tokens, False, dtype, products)}
    if compile:
        sides["counterflow, compiled kernels"] = ours(tokens, True, dtype, products)
    for attention, experts in TRANSFORMERS:
        make = partial(transformers_step, attention=attention, experts=experts)
        sides[f"transformers, {attention} attention, {experts} experts"] = make(ARCHITECTURE, tokens, dtype)
    try:
        sides["torchtitan, sdpa attention"] = torchtitan_step(ARCHITECTURE, tokens, dtype)
    except ImportError as error:
        print(f"without torchtitan, which cannot be imported: {error}")
    return sides


def report(seconds: dict[str, list[float]], peak: float, batch: int, length: int) -> None:
    """Print every side's figures, and our ratios to the fastest side of each library."""
    tokens = batch * length
    flops = flops_per_token(ModelConfig(**ARCHITECTURE, num_nextn_predict_layers=0), length) * tokens
    print(f"peak of a 2048-cubed matmul: {peak / 1e9:.0f} GFLOP/s; MFU counts {FLOP_CONVENTION}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:<52} {tokens / middle:>7.0f} tokens/s  {middle * 1e3:>6.0f} ms  MFU {flops / middle / peak:.1%}")
    for library in ("transformers", "torchtitan"):
        theirs = {name: statistics.median(times) for name, times in seconds.items() if name.startswith(library)}
        if not theirs:
            continue
        fastest = min(theirs, key=theirs.__getitem__)
        for name in (name for name in seconds if name.startswith("counterflow")):
            ratios = [a / b for a, b in zip(seconds[fastest], seconds[name], strict=True)]
            ratio = theirs[fastest] / statistics.median(seconds[name])
            print(f"{name} / fastest ({fastest}): {ratio:.2f} x (rounds {min(ratios):.2f} to {max(ratios):.2f})")


def profile(step: Callable[[], None], path: str) -> None:
    step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
    recorded.export_chrome_trace(path)


if __name__ == "__main__":
    main()
