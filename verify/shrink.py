"""A configuration made small enough to run here: the dimensions shrink, the topology stays.

Pure: no process group, no weight, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..configs.config import Config
from ..configs.write import plain
from ..data.tokenizer import ByteTokenizer
from ..model.config import ModelConfig
from ..parallel.layout import Layout
from ..parallel.schedule.choose import AUTO, schedule_name
from ..settings import TokenSchedule, UsageError
from .grid import Grid, choose_grid, choose_microbatches, missing, pipeline_of

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
SEQUENCE_LENGTH = 16
MICRO_SEQUENCES = 2
DENSE_LAYERS = 3
TOP_K = 8
BUCKET_MB = 0.05
TIMEOUT = 120.0
LOGIT_SPREAD = 0.5
"""Least standard deviation of a router's logits at the start, because close scores are near ties."""


class Change(NamedTuple):
    """A key whose value differs from the configuration's; `why` is empty where the value is only smaller."""

    key: str
    yours: Any
    """Value in the configuration."""
    here: Any
    why: str = ""


@dataclass(frozen=True)
class Shrunk:
    """A small configuration that stands for a large one."""

    config: Config
    layout: Layout
    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    """Properties of the topology that these ranks have no room for, in words."""

    def single_process(self) -> Config:
        """The same model and data for a single process: no pipeline, no groups."""
        tree = plain(self.config)
        tree["parallel"] = {"timeout": TIMEOUT, "dp": 1}
        return Config.model_validate(tree)


def shrink(config: Config, nproc: int | None = None, steps: int = 2) -> Shrunk:
    """The small run for at most `nproc` processes, by default as few as show the topology.

    Raises UsageError where `nproc` or `steps` is below 1, or the vocabulary cannot hold bytes.
    """
    if nproc is not None and nproc < 1:
        raise UsageError(f"--nproc is {nproc}: it must be at least 1")
    if steps < 1:
        raise UsageError(f"--steps is {steps}: it must be at least 1")
    tokens = ByteTokenizer().vocab_size
    if config.model.vocab_size < tokens:
        raise UsageError(f"model.vocab_size is {config.model.vocab_size}, but bytes are {tokens} tokens")
    grid = choose_grid(config, nproc)
    edits = _Edits(config)
    _shrink_parallel(config, grid, edits)
    _shrink_layers(config, edits)
    _shrink_widths(config.model, edits)
    _shrink_experts(config, grid, edits)
    _shrink_batch(config, grid, edits)
    _make_constant(config, edits)
    edits.set("optim.bucket_mb", min(config.optim.bucket_mb, BUCKET_MB), "several buckets, as configured")
    edits.set("train.steps", steps)
    edits.quietly("train.tokens", None)
    if config.run.compile:
        edits.set("run.compile", False, "compiling takes minutes")
    edits.quietly("run.device", "cpu")
    edits.quietly("comm.backend", "gloo")
    if config.comm.dispatcher == "deepep":
        edits.set("comm.dispatcher", "two-hop", "what DeepEP does, on CPUs")
    edits.quietly("log.tensorboard", False)
    small = Config.model_validate(edits.tree)
    node = small.parallel.gpus_per_node
    layout = Layout(grid.ranks, grid.pp, grid.ep, grid.ranks if node == "auto" else node)
    return Shrunk(small, layout, tuple(edits.changes), tuple(missing(config, grid)))


class _Edits:
    """A configuration as plain data, and the changes made to it."""

    def __init__(self, config: Config) -> None:
        self.tree: dict[str, Any] = plain(config)
        self.changes: list[Change] = []

    def set(self, path: str, value: Any, why: str = "") -> None:
        before = self.quietly(path, value)
        if before != value:
            self.changes.append(Change(path, before, value, why))

    def quietly(self, path: str, value: Any) -> Any:
        """Change a key without recording it, where verification does not depend on it; return the earlier value."""
        *sections, name = path.split(".")
        tree = self.tree
        for section in sections:
            tree = tree[section]
        before, tree[name] = tree[name], value
        return before


def _shrink_parallel(config: Config, grid: Grid, edits: _Edits) -> None:
    parallel = config.parallel
    pipeline = pipeline_of(config, grid.pp)
    edits.set("parallel.pp", grid.pp)
    edits.set("parallel.ep", grid.ep)
    edits.set("parallel.dp", grid.ep * (grid.edp or 1))
    if parallel.pp > 1 == grid.pp:
        edits.set("parallel.schedule", pipeline.name, "nothing to schedule on one rank")
        edits.quietly("parallel.schedule_options", {})
    elif parallel.schedule == AUTO and schedule_name(AUTO, grid.pp) != pipeline.name:
        edits.set("parallel.schedule", pipeline.name, f"what auto means for pp {parallel.pp}")
    node = parallel.gpus_per_node
    if node != "auto" and parallel.ep > node:
        # The ranks that exchange tokens still lie on several nodes.
        edits.set("parallel.gpus_per_node", max(1, grid.ep // 2))
    edits.quietly("parallel.timeout", min(parallel.timeout, TIMEOUT))


def _shrink_layers(config: Config, edits: _Edits) -> None:
    """Keep a layer per stage, one more, and the dense layers; an explicit split keeps its form."""
    model, configured = config.model, config.parallel.split
    schedule = pipeline_of(config, edits.tree["parallel"]["pp"]).schedule(edits.tree["parallel"]["pp"])
    assert schedule is not None
    stages = schedule.num_stages
    dense = min(model.first_k_dense_replace, DENSE_LAYERS)
    layers = min(model.num_hidden_layers, stages + dense + 1)
    if configured != "balanced":
        split = resize_split(configured, stages)
        layers = sum(split)
        edits.set("parallel.split", split)
    if model.first_k_dense_replace >= model.num_hidden_layers:
        dense = layers
    else:
        dense = min(dense, max(layers // 2, min(dense, layers - stages)), layers - 1)
    edits.set("model.num_hidden_layers", layers)
    edits.set("model.first_k_dense_replace", dense)


def resize_split(sizes: tuple[int, ...], stages: int) -> list[int]:
    """A split of few layers on `stages` stages with the unevenness of `sizes`, taken at its ends and evenly between.

    Stages with the fewest layers get one, those with more get two.
    """
    picked = [sizes[round(i * (len(sizes) - 1) / max(1, stages - 1))] for i in range(stages)]
    fewest = min(picked)
    even = fewest > 1 and len(set(picked)) == 1
    return [2 if size > fewest or even else 1 for size in picked]


def _shrink_widths(model: ModelConfig, edits: _Edits) -> None:
    for name, width in WIDTHS.items():
        if (configured := getattr(model, name)) is not None:
            edits.set(f"model.{name}", min(configured, width))
    edits.set("model.vocab_size", ByteTokenizer().vocab_size, "bytes")
    hidden = edits.tree["model"]["hidden_size"]
    # The spread of a matrix's outputs is proportional to std x sqrt(width).
    std = model.initializer_range * math.sqrt(model.hidden_size / hidden)
    std = float(f"{max(std, LOGIT_SPREAD / math.sqrt(hidden)):.2g}")
    edits.set("model.initializer_range", std, "for these widths")


def _shrink_experts(config: Config, grid: Grid, edits: _Edits) -> None:
    """Keep the fewest experts with which the router and every rank have a choice; groups and shared experts stay."""
    model = config.model
    experts, groups = model.n_routed_experts, model.n_group
    top_k = min(model.num_experts_per_tok, TOP_K)
    reachable = experts // groups * model.topk_group
    here = unit = math.lcm(groups, grid.ep)
    while here < experts and (
        here // groups < min(3, experts // groups)
        or here // grid.ep < min(2, experts // config.parallel.ep)
        or here // groups * model.topk_group < top_k + (reachable > model.num_experts_per_tok)
    ):
        here += unit
    edits.set("model.n_routed_experts", min(here, experts))
    edits.set("model.num_experts_per_tok", top_k)
    edits.set("model.n_shared_experts", min(model.n_shared_experts, 2))


def _shrink_batch(config: Config, grid: Grid, edits: _Edits) -> None:
    batch = config.batch
    length = min(batch.sequence_length, SEQUENCE_LENGTH)
    micro = min(batch.micro_sequences, MICRO_SEQUENCES)
    counts = choose_microbatches(config, grid)
    unit = grid.ep * (grid.edp or 1) * micro  # sequences that are one micro-batch of every pipeline
    edits.set("batch.sequence_length", length)
    edits.quietly("model.max_position_embeddings", length)
    edits.set("batch.micro_sequences", micro)
    edits.set("batch.global_sequences", counts["global_sequences"] * unit)
    if batch.ramp is not None:
        start = counts["ramp.start"] * unit
        edits.set("batch.ramp.start", start)
        edits.quietly("batch.ramp.increment", unit)
        edits.set("batch.ramp.tokens", float(start * length), "full at the second step")


def _make_constant(config: Config, edits: _Edits) -> None:
    """Set schedules to their largest value: a warm-up would begin this short run with zeros."""
    schedules: Mapping[str, TokenSchedule] = {
        "optim.lr": config.optim.lr,
        "balance.bias_update_speed": config.balance.bias_update_speed,
        "train.mtp_weight": config.train.mtp_weight,
    }
    for path, schedule in schedules.items():
        values = [value for phase in schedule.phases for value in (phase.value, phase.start, phase.end)]
        largest = max(value for value in values if value is not None)
        before = edits.quietly(path, largest)
        if before != largest:
            phases = f"{len(schedule.phases)} phases" if len(schedule.phases) > 1 else "1 phase"
            edits.changes.append(Change(path, phases, largest, "its largest value"))
