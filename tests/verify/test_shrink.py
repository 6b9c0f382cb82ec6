"""The small run of `counterflow verify`: dimensions shrink, the topology stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.source import shipped
from counterflow.data.config import DataConfig
from counterflow.model.counts import count_parameters
from counterflow.plan.pipeline import make_schedule, make_split
from counterflow.settings import UsageError
from counterflow.verify.grid import MOST_RANKS, Structure, choose_grid, grid_of, pipeline_of
from counterflow.verify.shrink import Shrunk, resize_split, shrink
from counterflow.verify.text import open_text

V3 = "deepseek-v3-671b"
DEEP = "model.num_hidden_layers=16"


def loaded(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "nproc", "grid"),
    [
        (V3, [], None, (2, 2, 2)),
        (V3, [], 8, (2, 2, 2)),
        (V3, [], 4, (2, 2, 1)),
        (V3, [], 7, (2, 2, 1)),
        (V3, [], 3, (2, 1, 1)),
        (V3, [], 1, (1, 1, 1)),
        (V3, [], 16, (4, 2, 2)),
        (V3, ["parallel.dp=64"], None, (4, 2, 1)),  # and pp 4 has stages in the middle
        (V3, ["parallel.dp=auto"], None, (2, 2, 2)),
        (V3, ["parallel.pp=15", "parallel.schedule=dualpipev"], 8, (2, 2, 2)),
        ("deepseek-v3-16b", [], None, (1, 2, 2)),
        ("deepseek-v3-16b", [], 8, (1, 4, 2)),
        ("smoke", [], None, (1, 2, 2)),
        ("smoke", [], 8, (1, 2, 4)),
        ("tiny", [], None, (1, 1, 2)),
        ("tiny", ["parallel.dp=1"], None, (1, 1, 1)),
        ("tiny", ["parallel.pp=3", "parallel.dp=1", "parallel.schedule=1f1b"], None, (3, 1, 1)),
        ("tiny", [DEEP, "parallel.pp=4", "parallel.dp=1"], None, (4, 1, 1)),
        ("tiny", [DEEP, "parallel.pp=4", "parallel.dp=1", "parallel.schedule=interleaved"], None, (2, 1, 1)),
    ],
)
def test_every_axis_above_one_stays_above_one_where_there_is_room(
    name: str, overrides: list[str], nproc: int | None, grid: tuple[int, int, int]
) -> None:
    assert tuple(choose_grid(loaded(name, *overrides), nproc)) == grid


CASES = [
    (V3, []),
    (V3, ["parallel.schedule=dualpipev", "parallel.pp=15"]),
    (V3, ["parallel.schedule=zb1p", "parallel.overlap_order=sequence", "model.num_nextn_predict_layers=2"]),
    (V3, ["parallel.schedule_options.defer_weights=true", "memory.recompute=full"]),
    (V3, ["parallel.schedule=interleaved", "parallel.schedule_options.stages_per_rank=3", "batch.ramp=null"]),
    ("deepseek-v3-16b", []),
    ("smoke", []),
    ("tiny", [DEEP, "parallel.pp=4", "parallel.split=[3,5,5,3]", "model.first_k_dense_replace=2"]),
]


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_the_topology_stays(name: str, overrides: list[str]) -> None:
    config = loaded(name, *overrides)
    shrunk = shrink(config)
    small = shrunk.config
    assert shrunk.layout.world_size <= MOST_RANKS
    for key in ("schedule_options", "overlap_order", "stage_costs"):
        assert getattr(small.parallel, key) == getattr(config.parallel, key)
    assert (small.parallel.split == "balanced") == (config.parallel.split == "balanced")
    assert small.memory.recompute == config.memory.recompute and small.precision == config.precision
    for key in ("n_group", "topk_group", "num_nextn_predict_layers", "n_shared_experts", "norm_topk_prob"):
        assert getattr(small.model, key) == getattr(config.model, key)
    assert (small.model.q_lora_rank is None) == (config.model.q_lora_rank is None)
    assert (small.batch.ramp is None) == (config.batch.ramp is None)
    for key in ("moments", "clip_norm", "weight_decay", "beta1", "beta2", "eps"):
        assert getattr(small.optim, key) == getattr(config.optim, key)
    assert count_parameters(small.model).total < 500_000
    _check_pipeline(config, shrunk)


def _check_pipeline(config: Config, shrunk: Shrunk) -> None:
    """The same kinds of actions, MoE and dense layers on both sides, a router with a choice."""
    small, layout = shrunk.config, shrunk.layout
    model = small.model
    schedule = make_schedule(small, small.batch.microbatches(small.batch.global_sequences, layout.dp))
    whole = pipeline_of(config, config.parallel.pp).schedule(3 * config.parallel.pp)
    assert whole is not None
    assert schedule.name == whole.name
    here, configured = Structure.of(schedule), Structure.of(whole)
    assert (here.forms, here.stages_per_rank) == (configured.forms, configured.stages_per_rank)
    assert make_split(small).num_stages == schedule.num_stages
    assert 0 < model.first_k_dense_replace < model.num_hidden_layers
    assert model.num_experts_per_tok < model.n_routed_experts // model.n_group * model.topk_group
    assert model.n_routed_experts // small.parallel.ep >= 2


def test_v3s_ramp_is_run_at_both_ends() -> None:
    shrunk = shrink(loaded(V3))
    batch = shrunk.config.batch
    sizes = [batch.sequences_at(0), batch.sequences_at(batch.sequences_at(0) * batch.sequence_length)]
    # 24 and 120 micro-batches for 16 ranks: 1.5 per rank, and more than the steady state needs.
    assert [shrunk.config.batch.microbatches(size, shrunk.layout.dp) for size in sizes] == [3, 6]


def test_few_micro_batches_stay_few() -> None:
    config = loaded("tiny", DEEP, "parallel.pp=4", "parallel.dp=2", "batch.global_sequences=8")
    small = shrink(config)
    assert small.layout.pp == 4
    assert small.config.batch.microbatches(small.config.batch.global_sequences, small.layout.dp) == 4


@pytest.mark.parametrize(
    ("sizes", "stages", "expected"),
    [
        ((4,) * 15 + (1,), 4, [2, 2, 2, 1]),
        ((3, 4, 4, 4, 4, 4, 4, 2), 2, [2, 1]),
        ((4, 4, 4, 4), 2, [2, 2]),
        ((1, 1, 1), 3, [1, 1, 1]),
        ((3, 5, 5, 3), 4, [1, 2, 2, 1]),
        ((7,), 1, [2]),
    ],
)
def test_an_explicit_split_keeps_its_form(sizes: tuple[int, ...], stages: int, expected: list[int]) -> None:
    assert resize_split(sizes, stages) == expected


def test_a_warm_up_does_not_make_the_run_stand_still() -> None:
    small = shrink(loaded(V3)).config
    assert (small.optim.lr.at(0), small.balance.bias_update_speed.at(0), small.train.mtp_weight.at(0)) == (
        2.2e-4,
        0.001,
        0.3,
    )


def test_initial_weights_keep_the_spread_of_what_they_make() -> None:
    config = loaded(V3)
    small = shrink(config).config.model
    yours = config.model.initializer_range * math.sqrt(config.model.hidden_size)
    assert small.initializer_range * math.sqrt(small.hidden_size) == pytest.approx(yours, rel=0.05)


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_shrink_and_leave_a_single_process_the_same_model(name: str) -> None:
    shrunk = shrink(loaded(name))
    alone = shrunk.single_process()
    assert alone.model == shrunk.config.model and alone.batch == shrunk.config.batch
    assert (alone.parallel.pp, alone.parallel.ep, alone.parallel.dp) == (1, 1, 1)
    assert {change.key for change in shrunk.changes} >= {"model.hidden_size", "batch.sequence_length"}


def test_what_there_is_no_room_for_is_said() -> None:
    assert shrink(loaded(V3), 1).lost == ("pp 16 is 1 here", "ep 64 is 1 here", "edp 2 is 1 here")
    assert shrink(loaded(V3), 8).lost == ("no stage lies between the first and the last",)
    assert shrink(loaded(V3), 16).lost == ()
    assert grid_of(loaded(V3)).ranks == 2048


@pytest.mark.parametrize(
    ("nproc", "steps", "overrides", "fault"),
    [
        (0, 1, [], "--nproc is 0"),
        (None, 0, [], "--steps is 0"),
        (None, 1, ["model.vocab_size=100"], "model.vocab_size is 100, but bytes are 257 tokens"),
    ],
)
def test_bad_usage_is_refused(nproc: int | None, steps: int, overrides: list[str], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        shrink(loaded("tiny", *overrides), nproc, steps)


def test_the_configured_text_is_used_where_it_can_be(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 5000)
    text = open_text(DataConfig(source="folder", path=str(tmp_path)))
    assert text.origin == str(tmp_path)
    assert text.offsets.tolist() == [0, 5001, 10002, 15003] and set(text.tokens) == {48, 49, 50, 256}


@pytest.mark.parametrize("there", [False, True])
def test_text_that_cannot_be_opened_is_replaced_and_said(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "corpus"
    if there:
        folder.mkdir()
        (folder / "a.txt").write_text("too short")
    text = open_text(DataConfig(source="folder", path=str(folder)))
    assert text.origin.startswith("the built-in text, since ") and str(folder) in text.origin
    assert len(text.tokens) >= 2**16
