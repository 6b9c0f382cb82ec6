"""Compare time and memory of a training step in FP8 with the same step in BF16, in one process, in turn.

    python benchmarks/fp8.py [--rounds 7] [--threads 2] [--batch 4] [--clock wall] [--profile FILE]

The model and batch are those of benchmarks/step.py, forward and backward of one micro-batch, with V3's recomputation.
On a CPU FP8 is emulated: every operand is quantised, and the products of the dequantised values are BF16's own. So the
ratio shows the cost of quantising. Scales are powers of two (the default) or as V3 has them, partly FP32, whose
products on a CPU are FP32.

Bytes are those of live tensors between forward and backward. "linear layers and SwiGLU" are the tensors that their
autograd nodes hold, each once, with nothing recomputed. The rest of a pass is the residual stream, queries, keys and
values (or their latents), the router, and the head's loss, which are BF16 or FP32 in both recipes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from counterflow.benchmarks.step import ARCHITECTURE, BATCH, CLOCKS, LENGTH, profile, timed
from counterflow.comm.flat import FlatDispatcher
from counterflow.fp8.config import PrecisionConfig
from counterflow.model.config import ModelConfig
from counterflow.model.naming import initialise
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import Transformer
from counterflow.tests.allocations import Allocations

SIDES = {
    "bf16": PrecisionConfig(recipe="bf16"),
    "fp8": PrecisionConfig(recipe="fp8"),
    "fp8, scales v3": PrecisionConfig(recipe="fp8", scales="v3"),
}
KEEPERS = ("_LinearFunctionBackward", "QuantizedFunctionBackward", "SwiGLU")
V3_PROPORTIONS = {  # widths a sixteenth of DeepSeek-V3's, heads an eighth as many, experts an eighth as many
    "vocab_size": 512,
    "hidden_size": 448,
    "intermediate_size": 1152,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 512,
}


def build(architecture: dict[str, Any], precision: PrecisionConfig, recompute: RecomputePolicy) -> Transformer:
    config = ModelConfig(**architecture, num_nextn_predict_layers=0)
    experts = config.n_routed_experts
    dispatcher = FlatDispatcher(None, experts)
    model = Transformer(config, dispatcher, range(experts), recompute, recipe=precision.make())
    initialise(model, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.train()


def tokens_of(architecture: dict[str, Any], sequences: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, architecture["vocab_size"], (sequences, LENGTH + 1), generator=generator)


def step_of(precision: PrecisionConfig, batch: int = BATCH) -> Callable[[], None]:
    """One forward and backward. Each step quantises its weights again, because weights change with every step."""
    model, tokens = build(ARCHITECTURE, precision, "v3"), tokens_of(ARCHITECTURE, batch)

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0)
        model.zero_grad(set_to_none=True)
        out = model(tokens)
        (out.loss / (batch * LENGTH) + 1e-4 / batch * out.balance).backward()

    return step


def held(architecture: dict[str, Any], precision: PrecisionConfig, recompute: RecomputePolicy) -> tuple[int, int]:
    """Bytes that a pass holds between forward and backward: in total, and for linear layers and SwiGLU."""
    model, tokens = build(architecture, precision, recompute), tokens_of(architecture, 2)
    model(tokens)  # rotary tables and quantised weights are made once and stay
    with Allocations() as allocations:
        output = model(tokens)
    total = allocations.bytes_alive()
    if recompute != "none":  # looking at a rebuilt tensor would rebuild it
        return total, 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for node in nodes(output.loss.grad_fn)
        if node.name().startswith(KEEPERS)
        for tensor in node.saved_tensors
        if tensor is not None
    }
    return total, sum(size for pointer, size in kept.items() if pointer not in weights)


def nodes(root: Any) -> Iterator[Any]:
    """Every node of an autograd graph once."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of the micro-batch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu counts this process's processor time")
    parser.add_argument("--profile", metavar="FILE", help="profile the FP8 step instead: a table here, a trace to FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        profile(step_of(SIDES["fp8"], args.batch), args.profile)
        return
    time_steps(args.rounds, args.batch, CLOCKS[args.clock])
    count_bytes()


def time_steps(rounds: int, batch: int, clock: Callable[[], float]) -> None:
    sides = {name: step_of(precision, batch) for name, precision in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        step()
    for turn in range(rounds):
        for name, step in list(sides.items())[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(step, clock))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["bf16"], strict=True)]
        ratio = statistics.median(times) / statistics.median(seconds["bf16"])
        spread = f"(rounds {min(ratios):.2f} to {max(ratios):.2f})"
        print(f"step in {name:<16} {statistics.median(times) * 1e3:>6.0f} ms  {ratio:.2f} x bf16 {spread}")


def count_bytes() -> None:
    print("bytes a token and layer held for the backward, bf16 -> fp8:")
    for title, architecture in (("this model", ARCHITECTURE), ("V3's proportions", V3_PROPORTIONS)):
        unit = 2 * LENGTH * int(architecture["num_hidden_layers"])
        policies: tuple[RecomputePolicy, ...] = ("none", "v3")
        for recompute in policies:
            found = [held(architecture, SIDES[name], recompute) for name in ("bf16", "fp8")]
            lines = [("everything", found[0][0], found[1][0])]
            if recompute == "none":
                lines.insert(0, ("linear layers and SwiGLU", found[0][1], found[1][1]))
            for what, bf16, fp8 in lines:
                title_of = f"{title}, recompute {recompute}, {what}"
                print(f"  {title_of:<60} {bf16 / unit:>7.0f} -> {fp8 / unit:>6.0f}  {fp8 / bf16:.2f} x")


if __name__ == "__main__":
    main()
