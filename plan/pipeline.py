"""From a configuration to its pipeline: the schedule, the layers of each stage and what each stage costs.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.config import Config
from ..model.config import ModelConfig
from ..model.counts import ParameterCounts, count_parameters
from ..parallel.layout import Layout
from ..parallel.schedule.actions import Schedule
from ..parallel.schedule.check import check
from ..parallel.schedule.choose import example, generate
from ..parallel.schedule.costs import Costs
from ..parallel.stages import Split, balance, rank_loads
from ..report.text.numbers import format_count
from ..settings import UsageError

PAIR_RATIO = 2.5 / 3
"""Length of an overlapped pair over that of its parts one after the other, where nothing else is given.

An assumption, 2.5 F for F = I = W: what the parts take one after the other includes the all-to-alls that a pair hides,
and V3 publishes the form of DualPipe's bubble (Table 2), not the length of its pairs.
"""

TERA = 1e12


@dataclass(frozen=True)
class Work:
    """What a part of the model costs in each of its three pieces, in one unit."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: Work) -> Work:
        return Work(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    def times(self, factor: float) -> Work:
        return Work(self.forward * factor, self.backward_input * factor, self.backward_weight * factor)

    def of_total(self, total: float) -> Work:
        """In the same proportions, with this sum."""
        return self.times(total / self.total) if self.total else Work(total / 2, 0.0, total / 2)


@dataclass(frozen=True)
class Parts:
    """The kinds of parts that stages are made of."""

    dense_layer: Work
    moe_layer: Work
    mtp_module: Work  # with its own pass through the head
    head: Work
    embedding: Work


def num_stages(config: Config) -> int:
    """Stages of the configured schedule: `parallel.pp`, or twice as many, or whatever its function makes."""
    return _example(config).num_stages


def microbatches(config: Config, layout: Layout, sequences: int) -> int:
    """Micro-batches that each pipeline of `layout` runs for a global batch of `sequences`.

    Raises UsageError where they cannot make it up exactly.
    """
    unit = layout.dp * config.batch.micro_sequences
    if sequences % unit or sequences < unit:
        near = sorted({max(1, sequences // unit) * unit, (sequences // unit + 1) * unit})
        raise UsageError(
            f"a global batch of {sequences} sequences is not a multiple of {unit} (dp {layout.dp} x "
            f"batch.micro_sequences {config.batch.micro_sequences}); nearest that work: {' or '.join(map(str, near))}"
        )
    return sequences // unit


def make_schedule(config: Config, num_microbatches: int) -> Schedule:
    """The configured schedule for a step of `num_microbatches`, checked. Raises UsageError where it cannot be."""
    parallel = config.parallel
    schedule = generate(parallel.schedule, parallel.pp, num_microbatches, parallel.schedule_options)
    check(schedule)
    return schedule


def make_split(config: Config) -> Split:
    """The layers of each stage, as `parallel.split` says. Raises UsageError where they do not fit the stages."""
    schedule, layers = _example(config), config.model.num_hidden_layers
    if config.parallel.split != "balanced":
        return Split.of_sizes(config.parallel.split, layers, schedule.num_stages)
    parts = part_costs(config)
    costs = [_layer(parts, config.model, layer).total for layer in range(layers)]
    behind = _behind_the_layers(parts, config.model).total
    return balance(costs, parts.embedding.total, behind, schedule.num_stages, schedule.stages_of_rank)


def part_costs(config: Config) -> Parts:
    """What each part costs for one micro-batch: `parallel.stage_costs` in its unit, or predicted in TFLOP.

    Measured costs are totals; how they divide into F, I and W is predicted in any case.
    """
    predicted, given = _predict(config), config.parallel.stage_costs
    if given is None:
        return predicted
    return Parts(
        predicted.dense_layer.of_total(given.dense_layer),
        predicted.moe_layer.of_total(given.moe_layer),
        predicted.mtp_module.of_total(given.mtp_module),
        predicted.head.of_total(given.head),
        predicted.embedding.of_total(given.embedding),
    )


def stage_costs(config: Config, pair_ratio: float = PAIR_RATIO, p2p: float = 0.0) -> Costs:
    """What a micro-batch costs on each stage of the configured split: see `part_costs` for the unit.

    `pair_ratio` is the length of an overlapped pair over that of its parts; `p2p` the latency of a transfer.
    """
    work = stage_work(config, make_split(config))
    return Costs(
        tuple(stage.forward for stage in work),
        tuple(stage.backward_input for stage in work),
        tuple(stage.backward_weight for stage in work),
        tuple(stage.total * (1 - pair_ratio) for stage in work),
        p2p_latency=p2p,
    )


def stage_work(config: Config, split: Split) -> list[Work]:
    """What a micro-batch costs on each stage of `split`, embedding, head and MTP included."""
    parts = part_costs(config)
    work = [sum((_layer(parts, config.model, layer) for layer in layers), Work()) for layers in split.layers]
    work[0] += parts.embedding
    work[-1] += _behind_the_layers(parts, config.model)
    return work


def describe_split(config: Config) -> str:
    """The split as a table of at most 80 columns: who holds each stage, its layers, parameters and share of the cost.

    Parameters are counted once for each stage, whoever holds it; an MTP module shares the embedding and the head.
    """
    split, schedule = make_split(config), _example(config)
    work, parameters = stage_work(config, split), _stage_parameters(config.model, split)
    whole = sum(stage.total for stage in work)
    rows: list[tuple[str, ...]] = [("stage", "ranks", "layers", "besides layers", "parameters", "cost")]
    for stage, layers in enumerate(split.layers):
        rows.append(
            (
                str(stage),
                " ".join(map(str, schedule.holders(stage))),
                _layers_in_words(config.model, layers),
                _besides(config.model, stage, split.num_stages),
                format_count(parameters[stage]),
                f"{work[stage].total / whole:.1%}",
            )
        )
    loads = rank_loads([stage.total for stage in work], schedule.stages_of_rank)
    busiest = loads.index(max(loads))
    return "\n".join([*align(rows), f"busiest: rank {busiest}, {loads[busiest] * len(loads) / whole:.2f} x the mean"])


def align(rows: list[tuple[str, ...]], left: frozenset[int] = frozenset({1, 2, 3})) -> list[str]:
    """Rows of cells as lines, two spaces between columns; those of `left` begin at the same place, others end there.
    Columns that are empty below their heading are left out."""
    columns = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    widths = {index: max(len(row[index]) for row in rows) for index in columns}
    return [
        "  ".join(row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in columns).rstrip()
        for row in rows
    ]


def _example(config: Config) -> Schedule:
    parallel = config.parallel
    return example(parallel.schedule, parallel.pp, parallel.schedule_options)


def _layer(parts: Parts, model: ModelConfig, layer: int) -> Work:
    return parts.moe_layer if model.is_moe(layer) else parts.dense_layer


def _behind_the_layers(parts: Parts, model: ModelConfig) -> Work:
    return parts.head + parts.mtp_module.times(model.num_nextn_predict_layers)


def _predict(config: Config) -> Parts:
    """TFLOP of one micro-batch on one rank, when every expert gets its even share of the tokens.

    A GEMM costs 2 FLOPs a weight and token in each of F, I and W. The attention core costs as much as two GEMMs over
    half the sequence, the rest is masked; its backward twice that, all of it in I. The head makes its gradients in the
    forward, where the logits are at hand (`model/loss.py`). The embedding is a lookup.
    """
    model, counts = config.model, count_parameters(config.model)
    tokens = config.batch.micro_sequences * config.batch.sequence_length
    unit = tokens / TERA
    widths = model.qk_head_dim + model.v_head_dim
    core = model.num_attention_heads * widths * config.batch.sequence_length * unit
    routed = counts.experts_per_token * counts.expert
    ffn = {"dense": counts.dense_ffn, "moe": counts.router + routed + counts.shared_experts}
    head = Work(3 * 2 * counts.head * unit)

    def layer(kind: str) -> Work:
        gemms = 2 * (counts.attention.matmul + ffn[kind]) * unit
        again = {"none": 0.0, "v3": 2 * _up_projections(model) * unit, "full": gemms + core}[config.memory.recompute]
        return Work(gemms + core, gemms + 2 * core + again, gemms)

    projection = 2 * counts.mtp_projection * unit
    mtp = Work(projection, projection, projection) + layer("moe") + head
    return Parts(layer("dense"), layer("moe"), mtp, head, Work())


def _up_projections(model: ModelConfig) -> int:
    """Weights of attention that `memory.recompute: v3` multiplies by again."""
    heads = model.num_attention_heads
    query = 0 if model.q_lora_rank is None else model.q_lora_rank * heads * model.qk_head_dim
    return query + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)


def _stage_parameters(model: ModelConfig, split: Split) -> list[int]:
    counts: ParameterCounts = count_parameters(model)
    parameters = [
        sum(counts.moe_block if model.is_moe(layer) else counts.dense_block for layer in layers)
        for layers in split.layers
    ]
    parameters[0] += counts.embedding
    parameters[-1] += counts.head + counts.final_norm + counts.mtp_modules * counts.mtp_module
    return parameters


def _layers_in_words(model: ModelConfig, layers: range) -> str:
    """`0-3 (3 dense)`."""
    shown = str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
    dense = sum(not model.is_moe(layer) for layer in layers)
    return f"{shown} ({dense} dense)" if dense else shown


def _besides(model: ModelConfig, stage: int, num_stages: int) -> str:
    extras = ["embedding"] if stage == 0 else []
    if stage == num_stages - 1:
        modules = model.num_nextn_predict_layers
        extras.append("head")
        extras += [f"{modules} MTP module{'s' * (modules > 1)}"] if modules else []
    return ", ".join(extras)
