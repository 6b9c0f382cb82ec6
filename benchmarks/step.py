"""Forward and backward of one micro-batch beside transformers' DeepseekV3ForCausalLM, in one process, in turn.

    python benchmarks/step.py [--rounds 7] [--threads 2] [--compile] [--profile FILE]

Both sides have the same architecture, token ids and number format, and the same number of threads. transformers is
timed with each attention and experts implementation that suits a CPU, and the fastest of them is the one compared
with. Prints tokens/s of every side, the ratio of medians with its spread over rounds, and MFU against the peak of a
2048-cubed matmul timed between the rounds (6 FLOPs a parameter and token plus attention without causal discount).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from counterflow.comm.flat import FlatDispatcher
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
# The others are far slower on a CPU (batched_mm copies an expert for every token) or need a GPU.
THEIRS = [("sdpa", "grouped_mm"), ("eager", "grouped_mm"), ("eager", "eager")]


def ours(tokens: torch.Tensor, compile: bool) -> Callable[[], None]:
    """One forward and backward of our model; gradients of BF16 parameters are dropped between steps."""
    config = ModelConfig(**ARCHITECTURE, num_nextn_predict_layers=0)
    experts = config.n_routed_experts
    model = Transformer(config, FlatDispatcher(None, experts), range(experts), kernels=Kernels.make(compile))
    initialise(model, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        out = model(tokens)
        (out.loss / (BATCH * LENGTH) + 1e-4 / BATCH * out.balance).backward()

    return step


def theirs(tokens: torch.Tensor, attention: str, experts: str) -> Callable[[], None]:
    """The same of transformers' model."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **ARCHITECTURE, num_key_value_heads=8, attn_implementation=attention, experts_implementation=experts
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).bfloat16().train()
    inputs = tokens[:, :-1]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs, labels=inputs, use_cache=False).loss.backward()

    return step


def peak_flops() -> float:
    """FLOP/s of one BF16 2048-cubed matmul."""
    a, b = torch.randn(2, 2048, 2048).bfloat16()
    seconds = min(timed(lambda: a @ b) for _ in range(5))
    return 2 * 2048**3 / seconds


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also time our kernels fused by torch.compile")
    parser.add_argument("--profile", metavar="FILE", help="profile our step instead: a table here, a trace to FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(
        0, ARCHITECTURE["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    if args.profile:
        profile(ours(tokens, args.compile), args.profile)
        return
    sides = {"counterflow": ours(tokens, compile=False)}
    if args.compile:
        sides["counterflow, compiled kernels"] = ours(tokens, compile=True)
    for attention, experts in THEIRS:
        sides[f"transformers, {attention} attention, {experts} experts"] = theirs(tokens, attention, experts)
    for step in sides.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for turn in range(args.rounds):
        peaks.append(peak_flops())
        for name, step in list(sides.items())[:: 1 if turn % 2 else -1]:
            step()  # not timed: the other side has left the heap and the caches to its own liking
            seconds[name].append(timed(step))
    report(seconds, statistics.median(peaks))


def report(seconds: dict[str, list[float]], peak: float) -> None:
    tokens = BATCH * LENGTH
    flops = flops_per_token(ModelConfig(**ARCHITECTURE, num_nextn_predict_layers=0), LENGTH) * tokens
    print(f"peak of a 2048-cubed BF16 matmul: {peak / 1e9:.0f} GFLOP/s; MFU counts {FLOP_CONVENTION}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:<52} {tokens / middle:>7.0f} tokens/s  {middle * 1e3:>6.0f} ms  MFU {flops / middle / peak:.1%}")
    fastest = min(
        (name for name in seconds if name.startswith("transformers")), key=lambda n: statistics.median(seconds[n])
    )
    for name in (name for name in seconds if name.startswith("counterflow")):
        ratios = [a / b for a, b in zip(seconds[fastest], seconds[name], strict=True)]
        ratio = statistics.median(seconds[fastest]) / statistics.median(seconds[name])
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
