"""The `parallel` and `optim` sections: the rank grid, the pipeline and the sharded optimizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from ..settings import Section, TokenSchedule, UsageError, key
from .overlap_orders import ORDERS, find_order


class StageCosts(Section):
    """Costs of the parts of the model for one micro-batch, forward and backward, in any one unit.

    `counterflow simulate CONFIG --measure` prints this section for the machine it runs on.
    """

    dense_layer: float = key(..., "a dense decoder layer", gt=0)
    moe_layer: float = key(..., "a mixture-of-experts decoder layer, on the experts one rank holds", gt=0)
    mtp_module: float = key(0.0, "an MTP module with its own pass through the output head", ge=0)
    head: float = key(0.0, "the output head with the loss", ge=0)
    embedding: float = key(0.0, "the embedding", ge=0)


class ExpertPlacementConfig(Section):
    """Moves of experts between the ranks of an expert parallel group, so that these get equal shares of the tokens."""

    every: int | None = key(
        None,
        "steps after which experts are placed by the loads of just these steps; null leaves them where they are. "
        "Moving experts does not change the result",
        unit="steps",
        ge=1,
    )
    gain: float = key(
        0.02, "a layer's experts move only if the load of its busiest rank falls by more than this share", ge=0, lt=1
    )
    evaluation_replicas: int | None = key(
        None,
        "places for a layer's experts during evaluations, on all ranks of a group together: the busiest experts are "
        "held several times, as for inference; a multiple of ep, at least n_routed_experts; null holds each once",
        ge=1,
    )


class ParallelConfig(Section):
    """The layout of ranks and the pipeline's schedule. dp = ep x edp; the world size is pp x dp."""

    pp: int = key(1, "pipeline parallel ranks", ge=1)
    ep: int = key(1, "expert parallel ranks: each holds n_routed_experts / ep experts of a layer", ge=1)
    dp: int | Literal["auto"] = key("auto", "data parallel ranks (a multiple of ep); auto follows from the world size")
    gpus_per_node: int | Literal["auto"] = key("auto", "ranks on a node; auto takes the number from the launcher")
    timeout: float = key(600.0, "how long a collective may wait for its peers", unit="seconds", gt=0)
    step_timeout: float | None = key(
        None,
        "the same after the first step of a start, which alone compiles kernels and makes connections; evaluations and "
        "checkpoints have to fit in; null keeps timeout",
        unit="seconds",
        gt=0,
    )
    schedule: str = key(
        "auto",
        "pipeline schedule: a name that `counterflow simulate --compare` lists, FILE.py:FUNCTION, or auto: 1f1b for "
        "pp 1, dualpipe for even pp, dualpipev for odd",
    )
    schedule_options: dict[str, Any] = key({}, "options of the schedule, such as stages_per_rank of interleaved")
    split: Literal["balanced"] | tuple[int, ...] = key(
        "balanced",
        "layers on each stage, in stage order; balanced minimises the cost of the costliest stage; with several stages "
        "per rank, layers then move off the busiest rank while that makes the ranks more even. The first stage also "
        "has the embedding, the last one the MTP modules and the head",
    )
    stage_costs: StageCosts | None = key(None, "costs by which the split is balanced; null predicts them from FLOPs")
    expert_placement: ExpertPlacementConfig = key(
        ExpertPlacementConfig(), "which rank holds which expert, by measured load"
    )
    overlap_order: Literal["v3", "sequence"] | tuple[str, ...] = key(
        "v3",
        "order in which the forward and the backward of a pair advance: v3 as in DeepSeek's trace, sequence one "
        "after the other, or a list of phases",
    )

    @field_validator("schedule_options", mode="before")
    @classmethod
    def _options_are_plain(cls, given: Any) -> Any:
        if given is None:  # `schedule_options:` with nothing below it
            return {}
        if not isinstance(given, dict):
            raise ValueError(
                f"expects options with their values, such as {{stages_per_rank: 2}}, got {yaml_text(given)}"
            )
        wrong = [name for name, value in given.items() if not isinstance(value, bool | int | float | str)]
        if wrong:
            raise ValueError(f"expects a number, text, true or false for {' and '.join(wrong)}")
        return given

    @field_validator("split", mode="before")
    @classmethod
    def _split_is_a_list_of_numbers(cls, given: Any) -> Any:
        if given == "balanced":
            return given
        whole = isinstance(given, list | tuple) and all(type(size) is int for size in given)
        if not whole or not given:
            raise ValueError(f"expects balanced or the number of layers on each stage, got {yaml_text(given)}")
        return tuple(given)

    @field_validator("overlap_order", mode="before")
    @classmethod
    def _order_is_a_list_of_phases(cls, given: Any) -> Any:
        if isinstance(given, str) and given in ORDERS:
            return given
        if not isinstance(given, list | tuple) or not given or not all(isinstance(step, str) for step in given):
            raise ValueError(f"expects {', '.join(ORDERS)} or a list of phases, got {yaml_text(given)}")
        try:
            return find_order(tuple(given))
        except UsageError as error:
            raise ValueError(str(error)) from None


def yaml_text(value: Any) -> str:
    """YAML text of `value`, for messages about keys."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else repr(value)


BF16_BETA2 = 1 - 1 / 258
"""Largest beta2 with which every second moment in BF16 can still fall.

Without gradients v becomes beta2 v, rounded to the nearest of 8 bits. Just above a power of two the neighbour below is
farthest away: from 1 + 1/128 half a unit is 1/256, and (1 - beta2) (1 + 1/128) has to be larger.
"""


class OptimConfig(Section):
    """AdamW as V3 uses it (V3 §4.2, §3.3.3), its state sharded as ZeRO-1."""

    lr: TokenSchedule = key(TokenSchedule.model_validate(2.2e-4), "learning rate: a number or phases in tokens")
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the root of the second moment (V3 does not state its value)", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay; one-dimensional parameters (norm gains) are exempt", ge=0)
    clip_norm: float | None = key(1.0, "largest global gradient norm; null never clips", gt=0)
    moments: Literal["bf16", "fp32"] = key("bf16", "storage of both Adam moments (V3 §3.3.3: bf16)")
    ema_decay: float | None = key(
        None,
        "decay per step of a moving average of the weights in CPU memory, which evaluations measure too: it spans "
        "1 / (1 - decay) steps; null keeps none (V3 §3.2.3 keeps one, its decay is not published)",
        gt=0,
        lt=1,
    )
    bucket_mb: float = key(
        256.0,
        "gradients reduced in one collective, and weights gathered in one, counted by the FP32 sums of gradients",
        unit="MiB",
        gt=0,
    )
    reduce: Literal["fp32", "bf16"] = key(
        "fp32",
        "format in which gradients are sent between replicas: bf16 halves the bytes, and rounds each rank's sum over "
        "its micro-batches. The ranks' sums are added up in FP32 either way",
    )
    overlap_gather: bool = key(
        True,
        "whether new weights are gathered during the next step's first forward; false waits for them at the end of the "
        "step",
    )

    def notes(self) -> tuple[str, ...]:
        """Sentences for the user on values that work, but not as well as they seem to."""
        if self.moments == "fp32" or self.beta2 <= BF16_BETA2:
            return ()
        return (
            f"optim.beta2 {self.beta2:g} with optim.moments bf16: second moments stop falling, because the most "
            f"that one can lose in a step, the share {1 - self.beta2:.2g}, is rounded away; set optim.moments to fp32, "
            f"or optim.beta2 to at most {BF16_BETA2:.3f}",
        )
