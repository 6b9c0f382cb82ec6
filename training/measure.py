"""Times of the parts of pipeline stages, on this machine at a configuration's widths.

One process stands for one rank: it holds as many experts as a rank, and computes on as many rows as an even router
sends to a rank. No tokens are sent.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.dispatcher import Dispatched, Pending
from ..configs.config import Config
from ..fp8.linear import Linear
from ..fp8.number_formats import DTYPES
from ..model.block import DecoderBlock, DenseBlock, MoEBlock
from ..model.counts import count_parameters
from ..model.kernels import EmbeddingFunction, Kernels
from ..model.loss import LOGITS_BYTES, cross_entropy_sum
from ..model.rope import rotary_factors
from ..settings import UsageError
from .backend import choose_recipe

ROUNDS = 5
ENOUGH_SECONDS = 20.0
"""Seconds after which no further round begins."""

Part = Callable[[], None]
"""Function that runs one part forward and backward."""


def measure_parts(config: Config, device: torch.device) -> str:
    """Measure `parallel.stage_costs`, as YAML for a config: milliseconds per micro-batch, forward and backward.

    The parts run in turn, so that a slow moment of the machine affects all of them. Raises UsageError where the parts
    do not fit into the memory of `device`.
    """
    _refuse_too_large(config, device)
    batch = config.batch
    print(f"timing micro-batches of {batch.micro_sequences} x {batch.sequence_length} tokens", file=sys.stderr)
    parts = _build(config, device)
    times: dict[str, list[float]] = {name: [] for name in parts}
    started = time.perf_counter()
    for run in range(ROUNDS + 1):
        for name, part in parts.items():
            taken = _time(part, device)
            if run or time.perf_counter() - started > ENOUGH_SECONDS:  # the first time warms up, if there is time
                times[name].append(taken)
        if all(times.values()) and time.perf_counter() - started > ENOUGH_SECONDS:
            break
    if not all(times.values()):  # the limit passed during the first round
        for name, part in parts.items():
            times[name].append(_time(part, device))
    return _as_yaml(config, {name: statistics.median(all_) * 1e3 for name, all_ in times.items()}, device, times)


def _as_yaml(config: Config, ms: dict[str, float], device: torch.device, times: dict[str, list[float]]) -> str:
    mtp = ms["projection"] + ms["moe_layer"] + ms["head"] if config.model.num_nextn_predict_layers else 0.0
    costs = {name: ms[name] for name in ("dense_layer", "moe_layer", "head", "embedding")} | {"mtp_module": mtp}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"
    rounds = min(map(len, times.values()))
    lines = ["parallel:", f"  stage_costs:  # ms, forward and backward; {where}; median of {rounds}"]
    for name, cost in costs.items():
        spread = (
            f"  # {min(times[name]) * 1e3:.4g} to {max(times[name]) * 1e3:.4g}" if name in times and rounds > 1 else ""
        )
        lines.append(f"    {name}: {float(f'{cost:.4g}')}{spread}")
    return "\n".join(lines) + "\n"


def _time(part: Part, device: torch.device) -> float:
    """Seconds that one run of a part takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _build(config: Config, device: torch.device) -> dict[str, Part]:
    """The parts, with random weights and inputs."""
    model, batch, dtype = config.model, config.batch, DTYPES[config.precision.format]
    shape = batch.micro_sequences, batch.sequence_length
    experts = model.n_routed_experts // config.parallel.ep
    kernels, recipe = Kernels.make(config.run.compile), choose_recipe(config, device)
    rotary = rotary_factors(model, batch.sequence_length, device)
    valid = torch.ones(batch.micro_sequences, dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(0.02).to(dtype)

    def layer(local_experts: range | None) -> Part:
        with torch.device("meta"):
            policy, even = config.memory.recompute, EvenShare(experts)
            block: DecoderBlock = (
                DenseBlock(model, kernels, policy, recipe)
                if local_experts is None
                else MoEBlock(model, local_experts, even, kernels, policy, recipe)
            )
        for parameter in block.parameters():
            parameter.data = parameter.data.to(dtype)
        _fill(block.to_empty(device=device), generator)
        x, gradient = random(*shape, model.hidden_size).requires_grad_(), random(*shape, model.hidden_size)

        def run() -> None:
            y, _ = block(x, rotary, valid)
            y.backward(gradient)

        return run

    tokens = torch.randint(model.vocab_size, shape, generator=generator, device=device)
    table = nn.Parameter(random(model.vocab_size, model.hidden_size))  # serves as embedding and as head
    hidden = random(*shape, model.hidden_size).requires_grad_()
    doubled, gradient = random(*shape, 2 * model.hidden_size).requires_grad_(), random(*shape, model.hidden_size)
    projection = Linear(2 * model.hidden_size, model.hidden_size, recipe.linear("mtp")).to(device, dtype)

    def embedding() -> None:
        embedded: Tensor = EmbeddingFunction.apply(tokens, table)
        embedded.backward(gradient)

    return {
        "dense_layer": layer(None),
        "moe_layer": layer(range(experts)),
        "projection": lambda: projection(doubled).backward(gradient),
        "head": lambda: cross_entropy_sum(hidden.flatten(0, 1), table, tokens.flatten()).backward(),
        "embedding": embedding,
    }


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device).mul_(0.02))
            else:
                tensor.fill_(1.0 if tensor.is_floating_point() else 0)


class NoTravel:
    """Counts that are complete without communication."""

    def complete(self) -> None:
        """Return at once."""


class EvenShare:
    """Dispatcher that gives a rank as many rows as an even router sends it, taken from the rank's own tokens.

    T tokens with K experts each make T K rows on every rank. Row r belongs to token r mod T. The experts' rows follow
    each other in equal numbers.
    """

    def __init__(self, num_local: int) -> None:
        self.num_local = num_local

    def begin_route(self, expert_ids: Tensor) -> NoTravel:
        return NoTravel()

    def begin_dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor, route: Any = None) -> Pending[Dispatched]:
        rows = expert_ids.numel()
        ends = [rows * (expert + 1) // self.num_local for expert in range(self.num_local)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
        spread = x.repeat(expert_ids.shape[1], 1)
        sent = Dispatched(spread, weights.t().flatten(), offsets, counts, expert_ids.shape)
        return Pending(x.new_zeros(()), lambda ticket: sent)

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        return self.begin_dispatch(x, expert_ids, weights).wait()

    def begin_combine(self, y: Tensor, dispatched: Dispatched) -> Pending[Tensor]:
        tokens, top_k = dispatched.handle
        together = y.view(top_k, tokens, -1).sum(0)
        return Pending(y.new_zeros(()), lambda ticket: together)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        return self.begin_combine(y, dispatched).wait()


def _refuse_too_large(config: Config, device: torch.device) -> None:
    """Raise UsageError where the parts need more memory than is free.

    They need weights and the activations of the largest layer, each with gradients.
    """
    model, counts, batch = config.model, count_parameters(config.model), config.batch
    width = DTYPES[config.precision.format].itemsize
    idle = (1 - 1 / config.parallel.ep) * counts.routed_experts * counts.expert
    weights = counts.dense_block + counts.moe_block - idle + counts.head + counts.mtp_projection
    tokens = batch.micro_sequences * batch.sequence_length
    heads = model.num_attention_heads * (3 * model.qk_head_dim + 2 * model.v_head_dim)
    rows = model.num_experts_per_tok * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
    per_token = 12 * model.hidden_size + heads + max(rows, 3 * model.intermediate_size)
    needed = 2 * (weights * width + tokens * per_token * width) + 2 * counts.head * 4 + LOGITS_BYTES
    free = _free_memory(device)
    if free is not None and needed > free:
        raise UsageError(
            f"measuring this model's layers takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            f"on {device.type}: set a larger parallel.ep (fewer experts per rank), or a smaller batch.micro_sequences "
            "or batch.sequence_length"
        )


def _free_memory(device: torch.device) -> int | None:
    """Free bytes; None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
