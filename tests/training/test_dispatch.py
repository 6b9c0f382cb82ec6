"""Choices, refusals and notes that follow from the section `comm`."""

from __future__ import annotations

import pytest
import torch

from counterflow.configs.config import Config
from counterflow.configs.load import ConfigError, load_config
from counterflow.fp8.recipe import Recipe
from counterflow.launcher.cli import main
from counterflow.parallel.layout import Layout
from counterflow.training.dispatch import (
    describe_dispatch,
    dispatch_faults,
    dispatcher_name,
    make_wire,
    nodes_a_token_reaches,
    partial_sums_of,
    routing_notes,
    wire_format,
)


def config(*overrides: str, name: str = "tiny") -> Config:
    return load_config(name, list(overrides))


def refused(*overrides: str, name: str = "tiny") -> str:
    with pytest.raises(ConfigError) as caught:
        config(*overrides, name=name)
    return "\n".join(str(fault) for fault in caught.value.faults)


def test_experts_that_the_group_does_not_divide_are_refused() -> None:
    said = refused("parallel.ep=3", "parallel.dp=3")
    assert "parallel.ep: 3 does not divide model.n_routed_experts 8 (nearest: 2 or 4)" in said


def test_a_node_limit_below_what_top_k_needs_is_refused() -> None:
    said = refused("model.num_experts_per_tok=5")
    assert "model.num_experts_per_tok: 5 is above the 4 experts in 2 of 4 groups of 8 experts" in said


def test_a_wire_that_does_not_carry_the_activations_is_refused() -> None:
    said = refused("comm.wire=bf16")
    assert "comm.wire: bf16 would round activations, which are FP32 with precision.recipe fp32" in said
    assert "auto or fp8 work" in said
    said = refused("comm.wire=bf16", "precision.recipe=fp8", "precision.high=fp32")
    assert "precision.high fp32" in said
    assert config("comm.wire=fp8").comm.wire == "fp8"


def test_deepep_that_cannot_carry_the_run_is_refused_with_what_works() -> None:
    said = refused("comm.dispatcher=deepep")
    assert "comm.dispatcher: deepep carries BF16 and FP8, and activations are FP32" in said
    assert "auto, flat and two-hop carry them" in said
    bf16 = "precision.recipe=bf16", "parallel.ep=2", "comm.dispatcher=deepep"
    (absent,) = dispatch_faults(config(*bf16, "run.device=cpu"), Layout(2, ep=2))
    assert "this run's device is cpu" in absent and "comm.dispatcher two-hop needs neither it nor a GPU" in absent
    found = dispatch_faults(config(*bf16, "run.device=cuda"), Layout(2, ep=2))
    assert any("DeepEP is not installed" in fault and "two-hop" in fault for fault in found)
    (alone,) = dispatch_faults(config("precision.recipe=bf16", "comm.dispatcher=deepep"), Layout(1))
    assert "comm.dispatcher flat works" in alone
    assert dispatch_faults(config(), Layout(2, ep=2)) == []


def test_a_run_set_to_deepep_where_it_cannot_work_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["precision.recipe=bf16", "comm.dispatcher=deepep", "run.device=cpu"]
    assert main(["train", "tiny", *(word for override in asked for word in ("--set", override))]) == 2
    assert "comm.dispatcher is deepep" in capfd.readouterr().err


def test_a_gpu_without_deepep_falls_back_and_one_with_it_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, two_nodes = config("precision.recipe=bf16"), Layout(8, ep=8, gpus_per_node=4)
    assert dispatcher_name(bf16, two_nodes, "cuda") == "two-hop"
    monkeypatch.setattr("counterflow.training.dispatch.deepep_faults_of", lambda *_: [])
    assert dispatcher_name(bf16, two_nodes, "cuda") == "deepep"
    assert dispatcher_name(bf16, two_nodes, "cpu") == "two-hop"
    assert dispatcher_name(bf16, Layout(1), "cuda") == "flat"


def test_other_names_are_refused_with_those_there_are() -> None:
    assert "auto, flat, two-hop or deepep" in refused("comm.dispatcher=twohop")
    assert "auto, fp8 or bf16" in refused("comm.wire=e4m3")
    assert "multiple of 2" in refused("comm.sms=21")


def test_auto_takes_two_hops_where_a_layers_experts_lie_on_several_nodes() -> None:
    tiny = config()
    assert dispatcher_name(tiny, Layout(8, ep=8, gpus_per_node=8)) == "flat"
    assert dispatcher_name(tiny, Layout(8, ep=8, gpus_per_node=4)) == "two-hop"
    assert dispatcher_name(tiny, Layout(6, ep=2, gpus_per_node=3)) == "two-hop", "the second group spans nodes"
    assert dispatcher_name(config("comm.dispatcher=flat"), Layout(8, ep=8, gpus_per_node=4)) == "flat"
    v3 = config(name="deepseek-v3-671b")
    layout = Layout(2048, pp=16, ep=64, gpus_per_node=8)
    assert describe_dispatch(v3, layout) == "two-hop, 64 ranks on 8 nodes; tokens travel in FP8"
    assert partial_sums_of(v3, layout) == [rank // 8 for rank in range(64)]
    assert partial_sums_of(tiny, Layout(8, ep=8, gpus_per_node=8)) is None


def test_auto_sends_what_the_recipe_quantises_anyhow() -> None:
    assert wire_format(config()) == "fp32"
    assert wire_format(config("precision.recipe=bf16")) == "bf16"
    assert wire_format(config("precision.recipe=fp8")) == "fp8"
    assert wire_format(config("precision.recipe=fp8", "precision.scales=v3")) == "fp8", "V3 has powers of two here"
    for name in ("experts_up.input", "experts_down.gradient"):
        for other in ("format: high", "tile: 128x128"):
            asked = f"precision.classes={{{name}: {{{other}}}}}"
            assert wire_format(config("precision.recipe=fp8", asked)) == "bf16", asked
    assert wire_format(config("precision.recipe=fp8", "comm.wire=bf16")) == "bf16"
    assert wire_format(config("precision.recipe=bf16", "comm.wire=fp8")) == "fp8"


def test_the_wire_notes_infinities_by_the_names_of_what_it_quantises() -> None:
    recipe = Recipe()
    wire = make_wire(config("precision.recipe=fp8"), recipe)
    wire.encode(torch.full((1, 128), float("inf")), "forward")
    wire.encode(torch.full((1, 128), float("inf")), "backward")
    assert recipe.monitor.infinite == ["experts_up.input", "experts_down.gradient"]


def test_groups_that_do_not_lie_on_a_node_each_are_noted() -> None:
    v3 = config(name="deepseek-v3-671b")
    on_eight = Layout(2048, pp=16, ep=64, gpus_per_node=8)
    assert nodes_a_token_reaches(v3, on_eight) == 4 and routing_notes(v3, on_eight) == ()
    on_four = Layout(2048, pp=16, ep=64, gpus_per_node=4)
    assert nodes_a_token_reaches(v3, on_four) == 8
    (note,) = routing_notes(v3, on_four)
    assert "8 of 16 nodes" in note and "4 groups (model.topk_group)" in note
    assert routing_notes(v3, Layout(2048, pp=16, ep=64, gpus_per_node=64)) == (), "nothing crosses"
    greedy = config("model.topk_method=greedy", "balance.bias_update_speed=0", name="deepseek-v3-671b")
    assert routing_notes(greedy, on_four) == (), "its groups limit nothing"
    # A node of five ranks is a matter of where groups of eight begin.
    assert nodes_a_token_reaches(v3, Layout(64, ep=64, gpus_per_node=5)) == 8
