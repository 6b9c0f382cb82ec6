"""Room and memory that NCCL's communicators take on a GPU."""

from __future__ import annotations

import pytest

from counterflow.comm.config import MaxCtas
from counterflow.comm.nccl import communicator_bytes
from counterflow.configs.load import load_config
from counterflow.parallel.layout import Layout
from counterflow.settings import UsageError
from counterflow.training.communicators import blocks_at_once, nccl_bytes, refuse_without_room, used_communicators

V3 = load_config("deepseek-v3-671b", ["batch.ramp=null", "batch.global_sequences=4352"])  # 34 micro-batches
LAYOUT = Layout(2048, 16, 64)
GIB = 2**30


def test_a_middle_rank_of_v3_uses_nine_communicators() -> None:
    used = {each.name: len(each.ranks) for each in used_communicators(V3, LAYOUT, 7 * 128 + 5)}
    assert used == {
        "world": 2048,
        "ep": 64,
        "counts": 64,
        **{f"from pipeline rank {a} to {b}": 2 for a, b in ((7, 8), (8, 7), (6, 7), (7, 6))},
        "dp of pipeline ranks (7, 8)": 256,
        "edp of pipeline ranks (7, 8)": 4,
    }
    one = load_config("tiny", ["parallel.schedule=1f1b"])
    assert {each.name for each in used_communicators(one, Layout(4, 1, 1), 0)} == {"world", "dp", "edp"}


def test_room_is_the_sum_of_the_caps_and_checked() -> None:
    # world, default group, ep, counts, four links, two reductions
    assert blocks_at_once(V3, LAYOUT, 7 * 128) == 1 + 1 + 16 + 1 + 4 * 2 + 2 * 8
    refuse_without_room(V3, LAYOUT, 7 * 128, 132)
    comm = V3.comm.model_copy(update={"max_ctas": MaxCtas(experts=64, pipeline=16)})
    with pytest.raises(UsageError, match="rank 896 take 147 multiprocessors at once, and its GPU has 132"):
        refuse_without_room(V3.model_copy(update={"comm": comm}), LAYOUT, 7 * 128, 132)


def test_memory_of_an_all_to_all_is_what_was_measured() -> None:
    measured = 3.3e9  # NCCL issue 1685: 8 GPUs of a node, 32 channels
    assert communicator_bytes("experts", range(8), 0, 8, 32) == pytest.approx(measured, rel=0.01)
    assert communicator_bytes("pipeline", (0, 1), 0, 8, 2) * 8 == communicator_bytes("experts", range(2), 0, 8, 16)


def test_caps_bound_the_memory_of_v3() -> None:
    capped = nccl_bytes(V3, LAYOUT, 7 * 128)
    assert 1.5 * GIB < capped < 3 * GIB
    wide = MaxCtas(experts=32, counts=32, pipeline=32, gradients=32, control=32)
    free = V3.model_copy(update={"comm": V3.comm.model_copy(update={"max_ctas": wide})})
    assert nccl_bytes(free, LAYOUT, 7 * 128) > 4 * capped
    assert nccl_bytes(load_config("tiny"), Layout(1), 0) == 0
