"""Rules between sections of a configuration: every pair of values that does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..comm.config import CommConfig
from ..fp8.config import PrecisionConfig
from ..model.config import ModelConfig
from ..parallel.config import ParallelConfig
from ..parallel.schedule.catalogue import find_schedule, schedule_names
from ..parallel.schedule.choose import example, option_faults, schedule_name
from ..parallel.stages import sizes_fault
from ..settings import Clash, UsageError, nearest_divisors, nearest_multiples
from .sections import BalanceConfig, BatchConfig


def find_clashes(
    model: ModelConfig,
    parallel: ParallelConfig,
    batch: BatchConfig,
    balance: BalanceConfig,
    precision: PrecisionConfig,
    comm: CommConfig,
) -> list[Clash]:
    """Return all clashes between these sections, each with the numbers and the nearest that work."""
    return [
        *_length_clashes(model, batch),
        *_expert_clashes(model, parallel),
        *_router_clashes(model, balance),
        *_width_clashes(model, precision),
        *_batch_clashes(parallel, batch),
        *_schedule_clashes(model, parallel),
        *_wire_clashes(precision, comm),
    ]


def _length_clashes(model: ModelConfig, batch: BatchConfig) -> Iterator[Clash]:
    length, longest = batch.sequence_length, model.max_position_embeddings
    if length > longest:
        keys = ("batch.sequence_length", "model.max_position_embeddings")
        yield Clash(keys, f"{length} is above model.max_position_embeddings {longest}")


def _expert_clashes(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Clash]:
    experts, ep, dp = model.n_routed_experts, parallel.ep, parallel.dp
    if experts % ep:
        near = nearest_divisors(ep, experts)
        message = f"{ep} does not divide model.n_routed_experts {experts} (nearest: {near})"
        yield Clash(("parallel.ep", "model.n_routed_experts"), message)
    replicas = parallel.expert_placement.evaluation_replicas
    if replicas is not None and experts % ep == 0 and (replicas < experts or replicas % ep):
        near = nearest_multiples(replicas, ep, experts)
        message = f"{replicas} is not a multiple of parallel.ep {ep} from {experts} experts on (nearest: {near})"
        keys = ("parallel.expert_placement.evaluation_replicas", "parallel.ep", "model.n_routed_experts")
        yield Clash(keys, message)
    if dp != "auto" and (dp < 1 or dp % ep):
        message = f"{dp} is not a positive multiple of parallel.ep {ep} (nearest: {nearest_multiples(dp, ep)})"
        yield Clash(("parallel.dp", "parallel.ep"), message)


def _router_clashes(model: ModelConfig, balance: BalanceConfig) -> Iterator[Clash]:
    """Settings of `balance` that the model's router cannot follow."""
    groups = [number for number in range(2, model.n_routed_experts + 1) if model.n_routed_experts % number == 0]
    for name in ("device_loss", "communication_loss", "capacity_factor"):
        value = getattr(balance, name)
        if value and model.n_group == 1:
            off = "null" if name == "capacity_factor" else "0"
            possible = [f"model.n_group {', '.join(map(str, groups))}"] if groups else []
            works = " or ".join([*possible, f"balance.{name} {off}"])
            message = f"{value:g} is for several groups of experts, but model.n_group is 1 (works: {works})"
            yield Clash((f"balance.{name}", "model.n_group"), message)
    speed, default = balance.bias_update_speed, type(balance).model_fields["bias_update_speed"].default
    moves = any(phase.value or phase.start or phase.end for phase in speed.phases)
    if moves and speed != default and not model.has_router_bias:
        message = (
            f"moves a bias that the router of model.topk_method {model.topk_method} has not "
            "(leave it out or set it to 0, or model.topk_method noaux_tc; balance.expert_loss works with every router)"
        )
        yield Clash(("balance.bias_update_speed", "model.topk_method"), message)


def _width_clashes(model: ModelConfig, precision: PrecisionConfig) -> Iterator[Clash]:
    """Widths of experts whose rows are not whole 16 bytes, as torch's grouped GEMM takes them."""
    format = precision.format
    unit = 8 if format == "bf16" else 4
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(model, name)
        if width % unit:
            near = nearest_multiples(width, unit)
            message = f"{width} is not a multiple of {unit}, as experts in {format} need (nearest: {near})"
            yield Clash((f"model.{name}", "precision.recipe"), message)


GPU_UNIT = 8
"""BF16 values in 16 bytes, in which GPUs read the rows of matrices and of attention heads."""


def gpu_width_clashes(model: ModelConfig, precision: PrecisionConfig) -> list[Clash]:
    """Widths that a GPU does not take in BF16: products fall to slow kernels, and attention to whole score matrices."""
    if precision.format != "bf16":
        return []
    widths = {
        **{f"model.{name}": getattr(model, name) for name in ("hidden_size", "intermediate_size")},
        **{f"model.{name}": getattr(model, name) for name in ("moe_intermediate_size", "q_lora_rank", "kv_lora_rank")},
        **{f"model.{name}": getattr(model, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    }
    return [
        Clash(
            (name, "run.device", "precision.recipe"),
            f"{width} is not a multiple of {GPU_UNIT}, as GPUs need in bf16 (nearest: "
            f"{nearest_multiples(width, GPU_UNIT)}; run.device cpu takes any width)",
        )
        for name, width in widths.items()
        if width is not None and width % GPU_UNIT
    ]


def _batch_clashes(parallel: ParallelConfig, batch: BatchConfig) -> Iterator[Clash]:
    """Global batches that are no whole number of micro-batches. With dp auto the launch checks them instead."""
    if parallel.dp == "auto" or parallel.dp < 1:
        return
    for name, message in batch.faults(parallel.dp).items():
        yield Clash((f"batch.{name}", "parallel.dp", "batch.micro_sequences"), message)


def _schedule_clashes(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Clash]:
    """A schedule that the pipeline's ranks cannot follow; stages that the model's layers cannot make up."""
    layers = model.num_hidden_layers
    name = schedule_name(parallel.schedule, parallel.pp)
    try:
        function = find_schedule(name)
    except UsageError as error:
        yield Clash(("parallel.schedule",), str(error))
        return
    faults = option_faults(function, parallel.schedule_options)
    for option, fault in faults.items():
        involved = (f"parallel.schedule_options.{option}", "parallel.schedule", "parallel.pp")
        yield Clash(involved, f"{fault} (schedule {name})")
    if faults:
        return
    keys = ("parallel.pp", "parallel.schedule", "parallel.schedule_options", "model.num_hidden_layers")
    if parallel.pp > layers:  # a schedule for any number of ranks could be huge, so none is made
        works = _ranks_that_work(parallel, layers)
        yield Clash(keys, f"{parallel.pp} is above the {layers} of model.num_hidden_layers{works}")
        return
    try:
        stages = example(parallel.schedule, parallel.pp, parallel.schedule_options).num_stages
    except UsageError as error:
        yield Clash(keys[:3], str(error))
        return
    if stages > layers:
        works = _ranks_that_work(parallel, layers)
        message = f"{parallel.pp} makes {stages} stages in schedule {name}, but model.num_hidden_layers is {layers}"
        yield Clash(keys, message + works)
    elif parallel.split != "balanced":
        wrong = sizes_fault(parallel.split, layers, stages)
        if wrong:
            yield Clash(("parallel.split", *keys), wrong)


def _ranks_that_work(parallel: ParallelConfig, layers: int) -> str:
    """Remedy for more stages than layers, in parentheses: fewer pipeline ranks, or schedules of fewer stages.

    The ranks named are the largest smaller number whose stages the layers can make up.
    """

    def fits(name: str, ranks: int, options: dict[str, Any]) -> bool:
        try:
            return example(name, ranks, options).num_stages <= layers
        except UsageError:
            return False

    fewer = range(min(parallel.pp - 1, layers), 0, -1)
    ranks = next((ranks for ranks in fewer if fits(parallel.schedule, ranks, parallel.schedule_options)), None)
    others = [name for name in schedule_names() if parallel.pp <= layers and fits(name, parallel.pp, {})]
    works = [] if ranks is None else [f"nearest: {ranks}"]
    works += [f"or schedule {' or '.join(others)}"] if others else []
    return f" ({', '.join(works)})" if works else ""


def _wire_clashes(precision: PrecisionConfig, comm: CommConfig) -> Iterator[Clash]:
    """A wire, or a dispatcher, that does not carry the activations."""
    if precision.format != "fp32":
        return
    key = "high" if precision.recipe == "fp8" else "recipe"
    if comm.dispatcher == "deepep":
        message = f"carries BF16 and FP8, and activations are FP32 with precision.{key} fp32"
        yield Clash(("comm.dispatcher", f"precision.{key}"), f"deepep {message} (auto, flat and two-hop carry them)")
    if comm.wire == "bf16":
        message = f"would round activations, which are FP32 with precision.{key} fp32 (auto or fp8 work)"
        yield Clash(("comm.wire", f"precision.{key}"), f"bf16 {message}")
