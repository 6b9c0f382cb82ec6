"""Table of a pipeline's stages."""

from __future__ import annotations

from ...configs.config import Config
from ...model.config import ModelConfig
from ...parallel.stages import rank_loads
from ...plan.costs import stage_parameters, stage_work
from ...plan.pipeline import example_schedule, make_split
from .numbers import count, format_count
from .table import align


def describe_split(config: Config) -> str:
    """Return the split as a table of at most 80 columns.

    A row per stage: the ranks that hold it, its layers, its parameters and its share of the cost. Parameters are
    counted once for each stage, however many ranks hold it.
    """
    split, schedule = make_split(config), example_schedule(config)
    work, parameters = stage_work(config, split), stage_parameters(config.model, split)
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
    summary = f"busiest: rank {busiest}, {loads[busiest] * len(loads) / whole:.2f} x the mean"
    return "\n".join([*align(rows, left=frozenset({1, 2, 3})), summary])


def _layers_in_words(model: ModelConfig, layers: range) -> str:
    """Numbers of the layers, as `0-3 (3 dense)`."""
    shown = str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
    dense = sum(not model.is_moe(layer) for layer in layers)
    return f"{shown} ({dense} dense)" if dense else shown


def _besides(model: ModelConfig, stage: int, num_stages: int) -> str:
    """Parts of a stage that are no decoder layers."""
    extras = ["embedding"] if stage == 0 else []
    if stage == num_stages - 1:
        modules = model.num_nextn_predict_layers
        extras.append("head")
        extras += [count(modules, "MTP module")] if modules else []
    return ", ".join(extras)
