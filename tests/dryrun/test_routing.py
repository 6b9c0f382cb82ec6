"""Stated routings: how many rows each rank gets, and that the router's limits hold."""

from __future__ import annotations

import pytest
import torch

from counterflow.configs.load import load_config
from counterflow.dryrun.rank import layout_of
from counterflow.dryrun.routing import TokenRouting

CASES = [("deepseek-v3-16b", 8, ()), ("tiny", 4, ("parallel.ep=4", "batch.sequence_length=64"))]


@pytest.mark.parametrize(("name", "world", "settings"), CASES)
def test_even_and_skewed_routings_have_the_loads_that_they_state(name: str, world: int, settings: list[str]) -> None:
    config = load_config(name, settings)
    layout = layout_of(config, world)
    even, skewed = (TokenRouting(routing, config, layout, 3) for routing in ("even", "skewed"))
    per_expert = even.counts.sum(0)
    assert per_expert.max() - per_expert.min() <= 1 and even.load == pytest.approx(1.0, abs=1e-3)
    assert 1.6 < skewed.load < 2.4


@pytest.mark.parametrize("routing", ["drawn", "even", "skewed"])
def test_tokens_reach_distinct_experts_in_no_more_groups_than_allowed(routing: str) -> None:
    config = load_config("tiny", ("parallel.ep=2",))
    model = config.model
    ids = torch.cat(TokenRouting(routing, config, layout_of(config, 2), 0).ids)  # type: ignore[arg-type]
    chosen = torch.nn.functional.one_hot(ids, model.n_routed_experts).sum(1)
    assert int(chosen.max()) == 1 and ids.shape[1] == model.num_experts_per_tok
    groups = chosen.view(len(ids), model.n_group, -1).sum(-1)
    assert int((groups > 0).sum(1).max()) <= model.topk_group
