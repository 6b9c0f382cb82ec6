"""Costs of a model's parts and of its pipeline stages, predicted in FLOPs or as measured.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.config import Config
from ..model.config import ModelConfig
from ..model.counts import count_parameters
from ..parallel.schedule.costs import Costs
from ..parallel.stages import Split

PAIR_RATIO = 2.5 / 3
"""Length of an overlapped pair over that of its parts one after the other, where nothing else is given.

This is an assumption: a pair takes 2.5 F where F = I = W. One after the other, its parts also take the time of the
all-to-alls that the pair hides. V3 publishes the form of DualPipe's bubble (Table 2), not the length of its pairs.
"""

TERA = 1e12


@dataclass(frozen=True)
class Work:
    """Cost of a part of the model in each of its three pieces, in one unit."""

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
        """Every piece multiplied by `factor`."""
        return Work(self.forward * factor, self.backward_input * factor, self.backward_weight * factor)

    def scaled_to(self, total: float) -> Work:
        """Pieces in the same proportions with the sum `total`; half forward, half backward where there is no work."""
        return self.times(total / self.total) if self.total else Work(total / 2, 0.0, total / 2)


@dataclass(frozen=True)
class Parts:
    """Costs of the kinds of parts that stages are made of."""

    dense_layer: Work
    moe_layer: Work
    mtp_module: Work  # with its own pass through the head
    head: Work
    embedding: Work


def part_costs(config: Config) -> Parts:
    """Cost of each part for one micro-batch: `parallel.stage_costs` in its unit, or predicted in TFLOP.

    Measured costs are totals; their division into F, I and W is predicted in any case.
    """
    predicted, given = _predict(config), config.parallel.stage_costs
    if given is None:
        return predicted
    return Parts(
        predicted.dense_layer.scaled_to(given.dense_layer),
        predicted.moe_layer.scaled_to(given.moe_layer),
        predicted.mtp_module.scaled_to(given.mtp_module),
        predicted.head.scaled_to(given.head),
        predicted.embedding.scaled_to(given.embedding),
    )


def costs_of_layers(config: Config) -> tuple[Work, list[Work], Work]:
    """Costs before the decoder layers, of each decoder layer, and behind them; see `part_costs` for the unit."""
    parts, model = part_costs(config), config.model
    layers = [parts.moe_layer if model.is_moe(layer) else parts.dense_layer for layer in range(model.num_hidden_layers)]
    return parts.embedding, layers, parts.head + parts.mtp_module.times(model.num_nextn_predict_layers)


def stage_work(config: Config, split: Split) -> list[Work]:
    """Cost of one micro-batch on each stage of `split`, with embedding, head and MTP modules."""
    before, each, behind = costs_of_layers(config)
    work = [sum((each[layer] for layer in layers), Work()) for layers in split.layers]
    work[0] += before
    work[-1] += behind
    return work


def stage_costs(config: Config, split: Split, pair_ratio: float = PAIR_RATIO, p2p: float = 0.0) -> Costs:
    """Costs of one micro-batch on each stage of `split`, for a simulation; see `part_costs` for the unit.

    `pair_ratio` is the length of an overlapped pair over that of its parts; `p2p` the latency of a transfer.
    """
    work = stage_work(config, split)
    return Costs(
        tuple(stage.forward for stage in work),
        tuple(stage.backward_input for stage in work),
        tuple(stage.backward_weight for stage in work),
        tuple(stage.total * (1 - pair_ratio) for stage in work),
        p2p_latency=p2p,
    )


def stage_parameters(model: ModelConfig, split: Split) -> list[int]:
    """Parameters of each stage of `split`; an MTP module shares the embedding and the head."""
    counts = count_parameters(model)
    parameters = [
        sum(counts.moe_block if model.is_moe(layer) else counts.dense_block for layer in layers)
        for layers in split.layers
    ]
    parameters[0] += counts.embedding
    parameters[-1] += counts.head + counts.final_norm + counts.mtp_modules * counts.mtp_module
    return parameters


def _predict(config: Config) -> Parts:
    """TFLOP of one micro-batch on one rank, when every expert gets its even share of the tokens.

    A GEMM costs 2 FLOPs per weight and token in each of F, I and W. The attention core costs as much as two GEMMs over
    half the sequence; the other half is masked. The core's backward costs twice as much, all in I. The head computes
    its gradients in the forward, where the logits are at hand (`model/loss.py`). The embedding is a lookup.
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
        forward = gemms + core
        recomputed = {"none": 0.0, "v3": 2 * _up_projections(model) * unit, "full": forward}[config.memory.recompute]
        return Work(forward, gemms + 2 * core + recomputed, gemms)

    projection = 2 * counts.mtp_projection * unit
    mtp = Work(projection, projection, projection) + layer("moe") + head
    return Parts(layer("dense"), layer("moe"), mtp, head, Work())


def _up_projections(model: ModelConfig) -> int:
    """Weights of attention that `memory.recompute: v3` multiplies by again."""
    heads = model.num_attention_heads
    query = 0 if model.q_lora_rank is None else model.q_lora_rank * heads * model.qk_head_dim
    return query + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
