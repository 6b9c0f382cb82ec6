"""Dry runs against real steps of several gloo ranks on CPU memory: bytes at the peak, messages and losses.

The real steps take the branch of the code that a GPU takes, see `as_gpu.py`. Their routers choose the experts of the
dry run's routing; all other values are those of training.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from counterflow.configs.config import Config
from counterflow.dryrun.metering import RecordedMeter
from counterflow.dryrun.rank import dry_run, layout_of
from counterflow.dryrun.routing import TokenRouting
from counterflow.tests.dryrun.as_gpu import HERE, Alive, as_gpu
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import open_text, tiny, write_text
from counterflow.training.build import make_groups
from counterflow.training.trainer import Trainer

Messages = dict[tuple[Any, ...], tuple[int, int]]
"""Bytes and messages by use and ranks of the group, purpose, collective and link."""

WORLD = 4
PRECISE = 0.01
SIZES = (
    *("model.hidden_size=256", "model.num_hidden_layers=4", "model.moe_intermediate_size=64"),
    *("model.max_position_embeddings=384", "batch.sequence_length=384", "batch.global_sequences=8"),
    *("parallel.pp=2", "parallel.ep=2", "precision.backend=emulated"),
)
PIPELINES = {
    "1f1b bf16 flat": ("parallel.schedule=1f1b", "precision.recipe=bf16"),
    "zb1p fp8 two-hop": ("parallel.schedule=zb1p", "precision.recipe=fp8", "parallel.gpus_per_node=1"),
    "dualpipe bf16 two-hop": ("parallel.schedule=dualpipe", "precision.recipe=bf16", "parallel.gpus_per_node=1"),
    "dualpipev fp8 flat": ("parallel.schedule=dualpipev", "precision.recipe=fp8"),
}
SHORT = {("v3", "dualpipe bf16 two-hop")}
CASES = [
    pytest.param(recompute, pipeline, marks=() if (recompute, pipeline) in SHORT else pytest.mark.long)
    for recompute, pipeline in product(("none", "v3", "full"), PIPELINES)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("real steps") / "text")


@pytest.mark.parametrize(("recompute", "pipeline"), CASES)
def test_peak_and_messages_are_those_of_a_real_step(pool: Pool, text: Path, recompute: str, pipeline: str) -> None:
    config = tiny(text, *SIZES, *PIPELINES[pipeline], f"memory.recompute={recompute}")
    for rank, (most, messages, loss) in enumerate(pool.run(_real_step, WORLD, config)):
        if rank % 3:  # the first and the last rank differ in every coordinate
            continue
        run = dry_run(config, WORLD, rank, layer=False)
        assert loss < 7.0
        assert run.peak_bytes == pytest.approx(most, rel=PRECISE), (rank, run.peak_bytes / most, run.peak_label)
        assert _by_group(run.traffic, run.communicators) == messages


def _real_step(worker: Worker, config: Config) -> tuple[int, Messages, float]:
    """Most bytes alive in a step, the messages that the meter counted, and the loss."""
    layout = layout_of(config, worker.world_size)
    with as_gpu():
        groups = make_groups(config, layout, "cpu")
        meter = RecordedMeter(groups.meter.node_of)
        routing = TokenRouting("drawn", config, layout, worker.rank)
        data = open_text(config)
        with Alive() as alive:
            trainer = Trainer(config, replace(groups, meter=meter), HERE, data)
            for _, router in trainer.model.routers():
                router.selection = lambda scores: routing.ids[routing.here]
            alive.most = alive.now
            meter.restart()
            loss = trainer.step().loss
        trainer.close()
    return alive.most, _by_group(meter.by_group, meter.communicators), loss


def _by_group(traffic: Any, communicators: Any) -> Messages:
    return {
        (*communicators[name], kind.purpose, kind.collective, kind.link): (tally.bytes, tally.messages)
        for name, kinds in traffic.items()
        for kind, tally in kinds.items()
    }
