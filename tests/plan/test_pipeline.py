"""Pipeline of a configuration: refusals, the split of layers, the costs of stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.configs.write import explain, to_yaml
from counterflow.model.counts import count_parameters, flops_per_token
from counterflow.parallel.layout import Layout
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.choose import default_schedule
from counterflow.parallel.schedule.simulate import simulate
from counterflow.parallel.stages import Split
from counterflow.plan.costs import PAIR_RATIO, part_costs, stage_costs, stage_work
from counterflow.plan.pipeline import example_schedule, make_schedule, make_split
from counterflow.report.text.split import describe_split
from counterflow.settings import UsageError
from counterflow.training.preflight import bubble_notes, prepare_run

OWN_SCHEDULE = '''
import dataclasses
from counterflow.parallel.schedule.catalogue import find_schedule

def one_more(num_ranks, num_microbatches, *, fast=True, share: float = 0.5):
    """1F1B by another name that takes micro-batches in threes."""
    from counterflow.settings import UsageError
    if num_microbatches % 3:
        raise UsageError(f"one_more takes micro-batches in threes, not {num_microbatches}")
    return dataclasses.replace(find_schedule("1f1b")(num_ranks, num_microbatches), name="one_more")
'''


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*overrides: str, config: str = "tiny") -> Config:
    return load_config(config, [f"parallel.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["pp=2", "schedule=x"], "parallel.schedule: there is no schedule 'x'"),
        (["pp=2", "schedule=dulapipe"], "Did you mean dualpipe"),
        (["pp=3", "schedule=dualpipe"], "parallel.pp: dualpipe needs an even number of pipeline ranks"),
        (["pp=3", "schedule=dualpipe"], "got 3: take 2 or 4"),
        (["pp=3"], "parallel.pp: 3 makes 6 stages in schedule dualpipev, but model.num_hidden_layers is 3 (nearest: 2"),
        (["pp=3"], "or schedule gpipe or 1f1b or zb1p)"),
        (
            ["pp=2", "schedule=interleaved"],
            "2 makes 4 stages in schedule interleaved, but model.num_hidden_layers is 3",
        ),
        (["pp=5"], "parallel.pp: 5 is above the 3 of model.num_hidden_layers (nearest: 2)"),
        (["pp=100000"], "parallel.pp: 100000 is above the 3 of model.num_hidden_layers (nearest: 2)"),
        (["pp=2", "split=[1,1]"], "parallel.split: [1, 1] has 2 layers, but the model has 3 (for example [2, 1])"),
        (["pp=2", "split=[1,1,1]"], "[1, 1, 1] has 3 stages, but the schedule has 2 (for example [2, 1])"),
        (["pp=2", "split=[3,0]"], "parallel.split: [3, 0] has a stage without a layer (for example [2, 1])"),
        (["split=balancd"], "expects balanced or the number of layers on each stage, got 'balancd'"),
        (["split=[1,a]"], "expects balanced or the number of layers on each stage, got [1, 'a']"),
        (["split=null"], "expects balanced or the number of layers on each stage, got null"),
        (["overlap_order=v4"], "expects v3, sequence or a list of phases, got 'v4'"),
        (
            ["overlap_order=[F.atention]"],
            "parallel.overlap_order: 'F.atention' is no phase of a pair (did you mean F.attention",
        ),
        (["overlap_order=[]"], "expects v3, sequence or a list of phases, got []"),
        (["schedule_options=2"], "expects options with their values, such as {stages_per_rank: 2}, got 2"),
        (["schedule_options.a=[1]"], "expects a number, text, true or false for a"),
        (["schedule=interleaved", "schedule_options.stage_per_rank=2"], "did you mean stages_per_rank?"),
        (["schedule=interleaved", "schedule_options.stages_per_rank=two"], "expects a whole number, got 'two'"),
        (["schedule=interleaved", "schedule_options.stages_per_rank=true"], "expects a whole number, got true"),
        (["schedule=1f1b", "schedule_options.depth=2"], "parallel.schedule_options.depth: is unknown: it takes none"),
        (["stage_costs={moe_layer: 1}"], "parallel.stage_costs.dense_layer: is required: a dense decoder layer"),
        (
            ["dp=3"],
            "batch.global_sequences: 8 is not a multiple of 3 (dp 3 x batch.micro_sequences 1); nearest that work: 6",
        ),
    ],
)
def test_an_impossible_pipeline_is_refused_when_the_configuration_is_loaded(overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    (only,) = caught.value.faults
    assert fault in str(only)


def test_faults_of_the_pipeline_come_with_all_others() -> None:
    with pytest.raises(ConfigError) as caught:
        load("pp=2", "split=[1,1]", "dp=3", "ep=3", "timeout=0", "schedule_options.x=1")
    keys = [fault.key for fault in caught.value.faults]
    assert sorted(keys) == [
        "batch.global_sequences",
        "parallel.ep",
        "parallel.schedule_options.x",
        "parallel.timeout",
    ]


def test_pipeline_keys_print_and_load_again() -> None:
    overrides = ["pp=2", "schedule=interleaved", "schedule_options.stages_per_rank=1", "split=[2,1]"]
    config = load(*overrides, "stage_costs={dense_layer: 1, moe_layer: 2.5}", "overlap_order=[F.attention, B.combine]")
    for text in (to_yaml(config), explain(config), to_yaml(load())):
        Path("again.yaml").write_text(text)
        again = load_config("again.yaml")
        assert again.parallel == (load() if text == to_yaml(load()) else config).parallel


def test_auto_is_dualpipe_on_even_and_dualpipev_on_odd_numbers_of_ranks() -> None:
    assert [default_schedule(ranks) for ranks in (1, 2, 3, 16)] == ["1f1b", "dualpipe", "dualpipev", "dualpipe"]
    for ranks in range(1, 9):
        find_schedule(default_schedule(ranks))(ranks, 3)
    assert make_schedule(load("pp=2"), 4).name == "dualpipe"


def test_schedule_of_the_users_own_file_takes_its_options_and_refuses_its_numbers() -> None:
    Path("own.py").write_text(OWN_SCHEDULE)
    config = load("pp=3", "schedule=own.py:one_more", "schedule_options.fast=false", "schedule_options.share=1")
    assert example_schedule(config).num_stages == 3
    assert example_schedule(load("pp=2", "schedule=own.py:one_more")).num_stages == 2
    assert make_schedule(config, 6).name == "one_more"
    with pytest.raises(UsageError, match="one_more takes micro-batches in threes, not 8"):
        make_schedule(config, 8)
    with pytest.raises(ConfigError, match=r"expects true or false, got 1"):
        load("pp=3", "schedule=own.py:one_more", "schedule_options.fast=1")


def test_counts_of_micro_batches_the_schedule_refuses_stop_a_run_before_it_starts() -> None:
    Path("own.py").write_text(OWN_SCHEDULE)
    with pytest.raises(UsageError, match=r"of 8 sequences is 8 micro-batches a pipeline: one_more takes .* in threes"):
        prepare_run(load("pp=3", "schedule=own.py:one_more"), 3, 3, Path("unused"))


def test_pipeline_gets_its_replicas_share_of_the_batch() -> None:
    v3 = load_config("deepseek-v3-671b")
    layout = Layout(2048, 16, 64, 8)
    assert [v3.batch.microbatches(size, layout.dp) for size in (3072, 15360)] == [24, 120]  # V3 §4.2 over 128 ranks
    with pytest.raises(UsageError, match=r"3000 sequences is not a multiple of 128 .* 2944 or 3072"):
        v3.batch.microbatches(3000, layout.dp)


def test_v3_has_four_layers_a_stage_and_one_beside_head_and_mtp() -> None:
    v3 = load_config("deepseek-v3-671b")
    assert make_schedule(v3, 24).name == "dualpipe"
    # github.com/deepseek-ai/profile-data: "each chunk contains 4 MoE layers".
    assert make_split(v3).sizes == (4,) * 15 + (1,)


def test_v3_keeps_dualpipes_published_order_and_full_recompute_defers_fewer_w() -> None:
    v3 = load_config("deepseek-v3-671b")
    published = find_schedule("dualpipe")(16, 120)
    for overrides in ([], ["precision.recipe=bf16"], ["memory.recompute=none"], ["memory.deferred_weights=8"]):
        assert make_schedule(load_config("deepseek-v3-671b", overrides), 120) == published, overrides
    full = load_config("deepseek-v3-671b", ["memory.recompute=full"])
    limited = make_schedule(full, 120)
    assert limited != published
    costs = stage_costs(full, make_split(full))
    assert simulate(limited, costs).step_time <= 1.01 * simulate(published, costs).step_time
    free = load_config("deepseek-v3-671b", ["memory.recompute=full", "memory.deferred_weights=null"])
    assert make_schedule(free, 120) == published
    # The ramp begins with 24 micro-batches: the memory is there for as many forwards as in the full batch.
    first, costs = find_schedule("dualpipe")(16, 24), stage_costs(v3, make_split(v3))
    assert simulate(make_schedule(v3, 24), costs).step_time <= 1.01 * simulate(first, costs).step_time


@pytest.mark.parametrize("recompute", ["none", "v3", "full"])
def test_predicted_work_adds_up_to_the_models_flops(recompute: str) -> None:
    """Independent count: 6 FLOPs per matmul parameter, attention cores over half the sequence as masked."""
    for name in ("deepseek-v3-671b", "deepseek-v3-16b", "tiny"):
        config = load_config(name, [f"memory.recompute={recompute}", "batch.micro_sequences=1"])
        model, length = config.model, config.batch.sequence_length
        cores = 3 * 2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * length
        cores *= model.num_hidden_layers + model.num_nextn_predict_layers
        expected = (flops_per_token(model, length) - cores / 2) * length / 1e12
        work = stage_work(config, make_split(config))
        if recompute == "none":
            assert sum(stage.total for stage in work) == pytest.approx(expected, rel=1e-9)
        else:
            assert sum(stage.total for stage in work) > expected
            assert sum(stage.forward + stage.backward_weight for stage in work) < expected
    parts = part_costs(config)
    if recompute == "full":  # a whole forward again, in front of the backward for the input
        assert parts.moe_layer.backward_input > 2 * parts.moe_layer.forward


def test_head_makes_its_gradients_in_the_forward() -> None:
    head = part_costs(load()).head
    assert head.forward > 0
    assert (head.backward_input, head.backward_weight) == (0, 0)


def test_given_costs_replace_predictions_and_keep_their_proportions() -> None:
    costs = "stage_costs={dense_layer: 3, moe_layer: 6, mtp_module: 8, head: 2, embedding: 1}"
    config = load("pp=3", "schedule=1f1b", costs)
    assert make_split(config).sizes == (1, 1, 1)
    assert [stage.total for stage in stage_work(config, make_split(config))] == pytest.approx([4, 6, 16])
    predicted, given = part_costs(load()).moe_layer, part_costs(config).moe_layer
    assert given.forward / given.total == pytest.approx(predicted.forward / predicted.total)
    # The costliest stage decides: a cheap head draws layers to the last stage.
    heavy = load("pp=2", "schedule=1f1b", "stage_costs={dense_layer: 1, moe_layer: 1, head: 9}")
    light = load("pp=2", "schedule=1f1b", "stage_costs={dense_layer: 1, moe_layer: 1, embedding: 9}")
    assert (make_split(heavy).sizes, make_split(light).sizes) == ((2, 1), (1, 2))


def test_pair_saves_the_stated_part_of_its_stages_work() -> None:
    config = load("pp=2")
    split = make_split(config)
    for costs, ratio in ((stage_costs(config, split), PAIR_RATIO), (stage_costs(config, split, 0.7), 0.7)):
        for stage in range(2):
            parts = costs.forward[stage] + costs.backward_input[stage] + costs.backward_weight[stage]
            assert parts - costs.hidden[stage] == pytest.approx(ratio * parts)
    assert stage_costs(config, split, p2p=0.25).p2p_latency == 0.25


def test_explicit_split_is_taken_as_it_is() -> None:
    assert make_split(load("pp=2", "split=[1,2]")) == Split((range(1), range(1, 3)))


def test_table_of_the_split_holds_every_layer_and_every_parameter_once() -> None:
    lines = describe_split(load("pp=2")).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["stage", "ranks", "layers", "besides", "layers", "parameters", "cost"],
        ["0", "0", "1", "0-1", "(1", "dense)", "embedding", "126.8K", "38.7%"],
        ["1", "0", "1", "2", "head,", "1", "MTP", "module", "166.5K", "61.3%"],
    ]
    assert count_parameters(load().model).trained == pytest.approx(126.8e3 + 166.5e3, abs=100)
    assert lines[3] == "busiest: rank 0, 1.00 x the mean"  # both ranks hold both stages
    for name, overrides in (("deepseek-v3-671b", []), ("deepseek-v3-671b", ["parallel.schedule=dualpipev"])):
        table = describe_split(load_config(name, overrides))
        assert max(map(len, table.splitlines())) <= 80


def test_ramp_that_starts_with_few_micro_batches_is_noted_with_what_it_costs() -> None:
    (note,) = bubble_notes(load_config("deepseek-v3-671b"), Layout(2048, 16, 64, 8))
    assert note.startswith("the batch ramp starts small: 24 micro-batches for 16 pipeline ranks leave them idle for ")
    assert "the 120 of the full batch for " in note
    assert bubble_notes(load(), Layout(1)) == ()


def test_batch_that_is_small_for_the_pipeline_is_noted() -> None:
    few = load_config("tiny", ["parallel.pp=2", "parallel.schedule=1f1b", "batch.global_sequences=2"])
    (note,) = bubble_notes(few, Layout(2, pp=2))
    assert note.startswith("2 micro-batches for 2 pipeline ranks leave them idle for ")
    assert bubble_notes(load("pp=2"), Layout(2, pp=2)) == ()
