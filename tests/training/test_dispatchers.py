"""Training over nodes and with an FP8 wire: results follow the single process's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from counterflow.comm.hops import HoppedTransfer
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import NUMBERS, Curve, make_trainer, relative, replicas, tiny, train
from counterflow.tests.training.test_pipelines import equal_bits

DEEP = ("model.num_hidden_layers=3", "run.seed=19")
STEPS = 2
# World size, pp, ep, ranks of a node, schedule, recompute.
LAYOUTS = [
    (4, 1, 4, 2, "1f1b", "none"),
    pytest.param(4, 1, 4, 3, "1f1b", "full", marks=pytest.mark.long),  # nodes of three ranks and of one
    pytest.param(4, 1, 4, 1, "zb1p", "v3", marks=pytest.mark.long),
    (8, 2, 4, 2, "dualpipe", "v3"),
    (4, 2, 2, 1, "zb1p", "none"),
]


def _layout(pp: int, node: int, schedule: str, recompute: str) -> tuple[str, ...]:
    return (
        f"parallel.pp={pp}",
        f"parallel.schedule={schedule}",
        f"parallel.gpus_per_node={node}",
        f"memory.recompute={recompute}",
    )


@pytest.fixture(scope="module")
def alone(pool: Pool, text: Path) -> Curve:
    curve: Curve = pool.run(train, 1, tiny(text, *DEEP), 1, STEPS)[0]
    assert curve.closest_choice > 1e-6, "choose another run.seed: a near tie may fall either way"
    return curve


@pytest.mark.parametrize(("world", "pp", "ep", "node", "schedule", "recompute"), LAYOUTS)
def test_two_hops_follow_the_single_process(
    pool: Pool, text: Path, alone: Curve, world: int, pp: int, ep: int, node: int, schedule: str, recompute: str
) -> None:
    ranks = pool.run(train, world, tiny(text, *DEEP, *_layout(pp, node, schedule, recompute)), ep, STEPS)
    for rank in ranks:
        for found, expected in zip(rank.numbers, alone.numbers, strict=True):
            assert all(relative(found[number], expected[number]) < 1e-5 for number in NUMBERS)
    for name, gradient in ((name, gradient) for rank in ranks for name, gradient in rank.gradients.items()):
        assert float((gradient - alone.gradients[name]).norm()) <= 1e-5 * float(alone.gradients[name].norm()), name
    for name, copies in replicas(ranks).items():
        assert all(torch.equal(copies[0], copy) for copy in copies), f"copies of {name} drifted apart"


def test_experts_on_several_nodes_are_reached_in_two_hops_unless_set_otherwise(pool: Pool, text: Path) -> None:
    def which(worker: Worker, *overrides: str) -> tuple[str, int]:
        trainer = make_trainer(tiny(text, *overrides), 2, 2)
        dispatcher = trainer.model.dispatcher
        return type(dispatcher).__name__, dispatcher.nodes.count if hasattr(dispatcher, "nodes") else 0

    assert pool.run(which, 2)[0][0] == "FlatDispatcher"
    assert pool.run(which, 2, "parallel.gpus_per_node=1") == [(TwoHopDispatcher.__name__, 2)] * 2
    assert pool.run(which, 2, "parallel.gpus_per_node=1", "comm.dispatcher=flat")[0][0] == "FlatDispatcher"
    assert pool.run(which, 2, "comm.dispatcher=two-hop") == [(TwoHopDispatcher.__name__, 1)] * 2


def test_orders_of_overlap_give_the_same_bits_in_two_hops(pool: Pool, text: Path) -> None:
    layout = _layout(2, 1, "dualpipe", "v3")
    runs = [
        pool.run(train, 4, tiny(text, *DEEP, *layout, f"parallel.overlap_order={order}"), 2, 2)
        for order in ("v3", "sequence", "[F.dispatch, W, F.attention, B.finish, F.shared, B.combine]")
    ]
    for other in runs[1:]:
        for found, expected in zip(other, runs[0], strict=True):
            assert equal_bits(found, expected)


def test_pairs_launch_second_hops_before_anybody_waits_for_them(pool: Pool, text: Path) -> None:
    def launched(worker: Worker) -> int:
        trainer = make_trainer(tiny(text, *DEEP, *_layout(2, 1, "dualpipe", "none")), 4, 2)
        with mock.patch.object(HoppedTransfer, "advance", autospec=True, side_effect=HoppedTransfer.advance) as advance:
            trainer.step()
        trainer.close()
        return advance.call_count

    assert all(pool.run(launched, 4))


FP8 = ("precision.recipe=fp8", "model.num_hidden_layers=4", "run.seed=7")
AT_ONCE = "batch.micro_sequences=8"


def test_an_fp8_wire_changes_no_bit_of_fp8_training(pool: Pool, text: Path) -> None:
    """With powers of two as scales, quantising received BF16 rows gives the codes that an FP8 wire would send."""
    wire, plain = (
        pool.run(train, 1, tiny(text, *FP8, AT_ONCE, f"comm.wire={wire}"), 1, STEPS)[0] for wire in ("auto", "bf16")
    )
    assert equal_bits(wire, plain)


def test_a_step_quantises_tokens_and_gradients_once_for_all_their_experts(pool: Pool, text: Path) -> None:
    def quantised(worker: Worker) -> set[tuple[str, int]]:
        trainer, seen = make_trainer(tiny(text, *FP8), 1, 1), set[tuple[str, int]]()
        # Along the rows; the weights' gradients quantise the experts' rows along the columns.
        trainer.model.recipe.monitor.observer = lambda name, x, _, __, contracted, ___: (
            seen.add((name, len(x))) if contracted else None
        )
        trainer.step()
        return seen

    batch = tiny(text).batch
    tokens = batch.micro_sequences * batch.sequence_length
    (seen,) = pool.run(quantised, 1)
    for name in ("experts_up.input", "experts_down.gradient"):
        assert {rows for each, rows in seen if each == name} == {tokens}, name


def test_fp8_training_over_an_fp8_wire_and_two_hops_follows_the_single_process(pool: Pool, text: Path) -> None:
    close = (*FP8, "precision.high=fp32")
    (one,) = pool.run(train, 1, tiny(text, *close), 1, STEPS)
    many = pool.run(train, 4, tiny(text, *close, "parallel.gpus_per_node=2"), 4, STEPS)
    for rank in many:
        for found, expected in zip(rank.numbers, one.numbers, strict=True):
            assert all(relative(found[number], expected[number]) < 1e-5 for number in NUMBERS)
    found = {name: gradient for rank in many for name, gradient in rank.gradients.items()}
    for name, expected in one.gradients.items():
        assert float((found[name] - expected).norm()) <= 1e-4 * float(expected.norm()), name


def test_an_fp8_wire_in_bf16_training_rounds_and_trains(pool: Pool, text: Path) -> None:
    bf16 = ("precision.recipe=bf16", "model.num_hidden_layers=4", "run.seed=7", AT_ONCE)
    plain, wire = (pool.run(train, 1, tiny(text, *bf16, f"comm.wire={wire}"), 1, 6)[0] for wire in ("bf16", "fp8"))
    losses = [(a["loss"], b["loss"]) for a, b in zip(plain.numbers, wire.numbers, strict=True)]
    assert any(a != b for a, b in losses), "the wire rounds what the recipe does not"
    assert all(abs(a - b) < 0.01 * a for a, b in losses)


def test_a_step_counts_what_all_its_ranks_send(pool: Pool, text: Path) -> None:
    """Pipeline, dispatch and combine against their tensors' sizes: 4 ranks, pp 2 x ep 2, every rank a node."""

    def step(worker: Worker) -> dict[tuple[str, str], int]:
        config = tiny(
            text, "parallel.pp=2", "parallel.schedule=1f1b", "parallel.gpus_per_node=1", "comm.dispatcher=flat"
        )
        trainer = make_trainer(config, 4, 2)
        metrics = trainer.step()
        again = trainer.step()
        assert metrics.traffic is not None and again.traffic is not None
        by_kind = {(sent.purpose, sent.link): sent.bytes for sent in again.traffic}
        assert (
            by_kind["pipeline", "between"]
            == {(sent.purpose, sent.link): sent.bytes for sent in metrics.traffic}["pipeline", "between"]
        )
        trainer.close()
        return by_kind

    results = pool.run(step, 4)
    assert all(result == results[0] for result in results), "every rank knows the sum"
    found = results[0]
    config = tiny(text)
    batch, hidden = config.batch, config.model.hidden_size
    sequence = batch.sequence_length * hidden * 4
    assert found["pipeline", "between"] == 2 * batch.global_sequences * sequence, "activations one way, gradients back"
    # Rows that leave their rank carry a gate weight on the way out, and bring its gradient back.
    rows = found["combine", "between"] // (hidden * 4)
    assert found["combine", "between"] == rows * hidden * 4 == found["combine backward", "between"]
    assert found["dispatch", "between"] == rows * (hidden + 1) * 4 == found["dispatch backward", "between"]
    layers = config.model.num_moe_layers
    tokens = batch.global_sequences * batch.sequence_length * config.model.num_experts_per_tok * layers
    assert 0.2 * tokens < rows < 0.8 * tokens
    assert not any(link == "within" for _, link in found)


def test_ranks_that_exchange_tokens_meet_after_every_pause(pool: Pool, text: Path, tmp_path: Path) -> None:
    def log_of(worker: Worker) -> list[str]:
        trainer, log = make_trainer(tiny(text), 1, 1), []
        with mock.patch.object(trainer.model.dispatcher, "synchronise", side_effect=partial(log.append, "meet")):
            for name, act in (
                ("step", trainer.step),
                ("step", trainer.step),
                ("evaluate", trainer.evaluate),
                ("evaluate", trainer.evaluate),
                ("save", lambda: trainer.save(tmp_path)),
                ("step", trainer.step),
            ):
                act()
                log.append(name)
        trainer.close()
        return log

    expected = "meet step step evaluate meet evaluate save meet step"
    assert pool.run(log_of, 1) == [expected.split()]
