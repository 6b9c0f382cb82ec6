"""What sections of a configuration ask of each other: every pair of values that does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..parallel.schedule.catalogue import find_schedule, schedule_names
from ..parallel.schedule.choose import example, option_faults, schedule_name
from ..parallel.stages import sizes_fault
from ..settings import Clash, UsageError
from ..training.dispatch import wire_clashes

if TYPE_CHECKING:
    from .config import Config


def find_clashes(config: Config) -> list[Clash]:
    """All of them, each with the numbers and the nearest that work."""
    return [
        *_length_clashes(config),
        *_expert_clashes(config),
        *_router_clashes(config),
        *_width_clashes(config),
        *_batch_clashes(config),
        *_schedule_clashes(config),
        *wire_clashes(config),
    ]


def _nearest(wanted: int, possible: list[int]) -> str:
    """The possible values next to `wanted`, one on each side where there is one."""
    below = [value for value in possible if value < wanted]
    above = [value for value in possible if value > wanted]
    return " or ".join(str(value) for value in (*below[-1:], *above[:1]))


def _length_clashes(config: Config) -> Iterator[Clash]:
    length, longest = config.batch.sequence_length, config.model.max_position_embeddings
    if length > longest:
        keys = ("batch.sequence_length", "model.max_position_embeddings")
        yield Clash(keys, f"{length} is above model.max_position_embeddings {longest}")


def _expert_clashes(config: Config) -> Iterator[Clash]:
    experts, ep, dp = config.model.n_routed_experts, config.parallel.ep, config.parallel.dp
    if experts % ep:
        near = _nearest(ep, [degree for degree in range(1, experts + 1) if experts % degree == 0])
        message = f"{ep} does not divide model.n_routed_experts {experts} (nearest: {near})"
        yield Clash(("parallel.ep", "model.n_routed_experts"), message)
    replicas = config.parallel.expert_placement.evaluation_replicas
    if replicas is not None and experts % ep == 0 and (replicas < experts or replicas % ep):
        near = _nearest(replicas, [experts + more * ep for more in range(max(0, replicas - experts) // ep + 2)])
        message = f"{replicas} is not a multiple of parallel.ep {ep} from {experts} experts on (nearest: {near})"
        keys = ("parallel.expert_placement.evaluation_replicas", "parallel.ep", "model.n_routed_experts")
        yield Clash(keys, message)
    if dp != "auto" and (dp < 1 or dp % ep):
        near = _nearest(dp, [max(multiple, 1) * ep for multiple in (dp // ep, dp // ep + 1)])
        message = f"{dp} is not a positive multiple of parallel.ep {ep} (nearest: {near})"
        yield Clash(("parallel.dp", "parallel.ep"), message)


def _router_clashes(config: Config) -> Iterator[Clash]:
    """Settings of `balance` that the model's router cannot follow."""
    model, balance = config.model, config.balance
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


def _width_clashes(config: Config) -> Iterator[Clash]:
    """torch's grouped GEMM takes rows of whole 16 bytes."""
    format = config.precision.format
    unit = 8 if format == "bf16" else 4
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(config.model, name)
        if width % unit:
            near = _nearest(width, [max(1, width // unit) * unit, (width // unit + 1) * unit])
            message = f"{width} is not a multiple of {unit}, as experts in {format} need (nearest: {near})"
            yield Clash((f"model.{name}", "precision.recipe"), message)


def _batch_clashes(config: Config) -> Iterator[Clash]:
    """Global batches that no whole number of micro-batches makes up; with dp auto, `prepare_run` knows."""
    dp = config.parallel.dp
    if dp == "auto" or dp < 1:
        return
    unit = dp * config.batch.micro_sequences
    for name, size in batch_sizes(config).items():
        if size % unit:
            near = _nearest(size, [multiple * unit for multiple in (size // unit, size // unit + 1) if multiple])
            message = f"{size} is not a multiple of {unit}, parallel.dp x batch.micro_sequences (nearest: {near})"
            yield Clash((f"batch.{name}", "parallel.dp", "batch.micro_sequences"), message)


def batch_sizes(config: Config) -> dict[str, int]:
    """The keys of `batch` whose values, in sequences, micro-batches on every rank have to make up."""
    batch = config.batch
    sizes = {"global_sequences": batch.global_sequences}
    if batch.ramp is not None:
        sizes |= {"ramp.start": batch.ramp.start, "ramp.increment": batch.ramp.increment}
    return sizes


def _schedule_clashes(config: Config) -> Iterator[Clash]:
    """A schedule that the pipeline's ranks cannot follow, and stages that the model's layers cannot make up."""
    parallel, layers = config.parallel, config.model.num_hidden_layers
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
    if parallel.pp > layers:  # and no schedule is made for a number of ranks that may be anything
        yield Clash(keys, f"{parallel.pp} is above the {layers} of model.num_hidden_layers{_ranks_that_work(config)}")
        return
    try:
        stages = example(parallel.schedule, parallel.pp, parallel.schedule_options).num_stages
    except UsageError as error:
        yield Clash(keys[:3], str(error))
        return
    if stages > layers:
        works = _ranks_that_work(config)
        message = f"{parallel.pp} makes {stages} stages in schedule {name}, but model.num_hidden_layers is {layers}"
        yield Clash(keys, message + works)
    elif parallel.split != "balanced":
        wrong = sizes_fault(parallel.split, layers, stages)
        if wrong:
            yield Clash(("parallel.split", *keys), wrong)


def _ranks_that_work(config: Config) -> str:
    """The largest smaller number of pipeline ranks whose stages the model's layers can make up, and the schedules that
    make fewer stages of the ranks there are."""
    parallel, layers = config.parallel, config.model.num_hidden_layers

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
