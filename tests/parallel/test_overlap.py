"""The overlap engine: any order runs every phase once, in each side's own order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.model.transformer import MicroBatch
from counterflow.parallel.overlap import run_pair
from counterflow.parallel.overlap_orders import ENTRIES, ORDERS, V3, find_order
from counterflow.phases import Tape, run
from counterflow.settings import UsageError
from counterflow.tests.model.small import build, global_gradients, random_tokens, small_config

FORWARD = ["embedding", "dense", *["attention", "dispatch", "shared", "experts", "combine", "finish"] * 2, "head"]


def phases_of(names: list[str], log: list[str], side: str) -> Generator[str, None, str]:
    for name in names:
        yield name
        log.append(f"{side}.{name}")
    return side


@given(st.lists(st.sampled_from(ENTRIES), max_size=30).map(tuple), st.booleans())
def test_any_order_runs_each_side_to_its_end_in_its_own_order(order: tuple[str, ...], full: bool) -> None:
    backward = FORWARD[::-1]
    if full:
        redone = [f"redo.{name}" for name in ("attention", "dispatch", "shared", "experts")]
        at = backward.index("finish") + 1
        backward = [*backward[:at], *redone, *backward[at:]]
    log: list[str] = []
    results = run_pair(phases_of(FORWARD, log, "F"), phases_of(backward, log, "B"), deque(), order)
    assert results == ("F", "B")
    assert [entry[2:] for entry in log if entry[0] == "F"] == FORWARD
    assert [entry[2:] for entry in log if entry[0] == "B"] == backward


def test_deepseeks_order_of_a_layer_pair() -> None:
    """Annotations of the published trace for two layers, with transfers named at their launch: combine(B),
    attention(F), mlp(B), dispatch(F), dispatch(B), mlp(W), mlp(F), attention(B), attention(W), combine(F).

    Our order launches dispatch(F) before mlp(B), which overlaps it in the trace, and combine(B) before attention(W).
    """
    log: list[str] = []
    queue = deque([lambda: log.append("W")])
    moe = ["attention", "dispatch", "shared", "experts", "combine", "finish"] * 2

    def backward() -> Generator[str, None, None]:
        for name in moe[::-1]:
            yield name
            log.append(f"B.{name}")
            if name in ("experts", "attention"):
                queue.append(lambda: log.append("W"))

    queue.clear()
    run_pair(phases_of(moe, log, "F"), backward(), queue, V3)
    middle = "B.finish W F.finish F.attention B.combine F.dispatch B.experts B.shared W F.shared F.experts F.combine"
    assert middle in " ".join(log)
    assert log[:4] == ["B.finish", "F.attention", "B.combine", "F.dispatch"]
    assert log[-2:] == ["W", "F.finish"]


def test_phases_are_named_as_in_the_model() -> None:
    config = small_config()
    for recompute in ("none", "full"):
        model = build(config, recompute=recompute)
        tape = Tape()
        batch = MicroBatch(random_tokens(config, 1, 20), torch.tensor([True]))
        forward = [f"F.{name}" for name in model.phases(batch, None, tape)]
        backward = [f"B.{name}" for name in tape.backward(None, model.weight_queue, None)]
        assert {*forward, *backward} <= set(ENTRIES)
        redone = {f"B.redo.{name}" for name in ("dense", "attention", "dispatch", "shared", "experts")}
        assert redone <= set(backward) if recompute == "full" else not redone & set(backward)
        assert {entry for entry in V3 if entry != "W" and ".redo." not in entry} <= {*forward, *backward}


def test_cut_and_deferred_gradients_are_plain_autograds() -> None:
    """Pieces of a single chunk's graph, weight gradients now or later, against one backward of the summed losses."""
    config = small_config(num_nextn_predict_layers=2)
    batch = MicroBatch(random_tokens(config, 2, 40), torch.tensor([True, False]))
    plain = build(config)
    out = plain(batch.tokens, batch.valid)
    (out.loss + out.balance + sum(out.mtp_losses)).backward()
    expected = global_gradients(plain)
    for later in (False, True):
        model, tape, deferred = build(config), Tape(), deque()
        output, result = run(model.phases(batch, None, tape))
        assert output is None and not result.loss.requires_grad and torch.equal(result.loss, out.loss)
        run(tape.backward(None, model.weight_queue, deferred if later else None))
        if later:
            assert len(deferred) > 20
            missing = {name for name, p in model.named_parameters() if p.grad is None}
            assert "layers.1.mlp.experts.down.weight" in missing and "layers.1.mlp.gate.weight" not in missing
            while deferred:
                deferred.popleft()()
        found = global_gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # The embedding and the head get several gradients, which are added in another order.
            if name in ("embedding", "head"):
                torch.testing.assert_close(found[name], gradient)
            else:
                assert torch.equal(found[name], gradient), name


def test_orders_are_found_by_name_or_checked() -> None:
    assert find_order("v3") == V3 and find_order("sequence") == ()
    assert find_order(["W", "F.experts"]) == ("W", "F.experts")
    assert set(V3) <= set(ENTRIES) and set(ORDERS) == {"v3", "sequence"}
    with pytest.raises(UsageError, match=r"did you mean F\.experts"):
        find_order(["F.expert"])
    with pytest.raises(UsageError, match="v3, sequence"):
        find_order("deepseek")
