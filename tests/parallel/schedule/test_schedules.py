"""Properties of every schedule: can run, holds no more than stated, and takes the time of its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule.actions import Action, Overlap, Schedule, forward_only
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.parallel.schedule.check import check
from counterflow.parallel.schedule.costs import Costs
from counterflow.parallel.schedule.simulate import simulate
from counterflow.parallel.schedule.timeline import Timeline
from counterflow.settings import UsageError
from counterflow.tests.parallel.schedule.cases import VARIANTS, examples, schedules

# F, I and W of a stage each, and a pair of F and B.
UNIT, PAIR = 10.0, 25.0
WHOLE = 3 * UNIT


def timed(name: str, ranks: int, microbatches: int, **options: bool | int) -> Timeline:
    schedule = find_schedule(name)(ranks, microbatches, **options)
    return simulate(schedule, Costs.uniform(schedule.num_stages, UNIT, UNIT, UNIT, PAIR))


@examples(150)
@given(schedule=schedules())
def test_every_schedule_can_run(schedule: Schedule) -> None:
    check(schedule)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_small_schedule_can_run(name: str, options: dict[str, bool | int]) -> None:
    for ranks in range(2 if name == "dualpipe" else 1, 7, 2 if name == "dualpipe" else 1):
        for microbatches in range(1, 16):
            check(find_schedule(name)(ranks, microbatches, **options))


@examples(150)
@given(schedule=schedules())
def test_peaks_are_the_known_bounds(schedule: Schedule) -> None:
    ranks, microbatches = schedule.num_ranks, schedule.num_microbatches
    peak = check(schedule).peak
    if schedule.name == "gpipe":
        assert peak == (microbatches,) * ranks
    elif schedule.name == "1f1b":
        assert peak == tuple(min(ranks - rank, microbatches) for rank in range(ranks))
    elif schedule.name == "zb1p":
        assert peak == (min(ranks, microbatches),) * ranks
    elif schedule.name == "interleaved":
        stages = schedule.num_stages // ranks
        warmup = [(stages - 1) * ranks + 2 * (ranks - rank - 1) for rank in range(ranks)]
        assert all(held <= min(most + 1, stages * microbatches) for held, most in zip(peak, warmup, strict=True))
    elif schedule.name == "dualpipe":
        assert max(peak) <= min(ranks + 1, microbatches)
    else:
        assert max(peak) <= min(2 * ranks + 1, 2 * microbatches)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_dualpipe_holds_one_more_than_its_ranks_on_each_of_them(ranks: int) -> None:
    for extra in (0, 2, 8):
        assert check(find_schedule("dualpipe")(ranks, 2 * ranks + extra)).peak == (ranks + 1,) * ranks
        assert check(find_schedule("dualpipev")(ranks // 2, ranks + extra)).peak == (ranks + 1,) * (ranks // 2)


# V3 Table 2, and the step of its replay. F&B is the pair, B the whole backward.
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 8), (4, 16), (4, 20), (6, 24), (8, 20), (12, 31), (16, 40)])
def test_worst_bubble_is_table_2(stages: int, microbatches: int) -> None:
    f, backward, w = UNIT, 2 * UNIT, UNIT
    assert max(timed("1f1b", stages, microbatches).bubble) == (stages - 1) * (f + backward)
    assert max(timed("gpipe", stages, microbatches).bubble) == (stages - 1) * (f + backward)
    assert max(timed("zb1p", stages, microbatches).bubble) == (stages - 1) * (f + backward - 2 * w)
    dual = (stages / 2 - 1) * (PAIR + backward - 3 * w)
    assert max(timed("dualpipev", stages // 2, microbatches).bubble) == dual
    if microbatches % 2 == 0:
        assert max(timed("dualpipe", stages, microbatches).bubble) == dual


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "step"),
    [
        ("dualpipe", 4, 16, 440),
        ("dualpipe", 4, 20, 540),
        ("dualpipe", 8, 20, 590),
        ("dualpipe", 16, 40, 1190),
        ("dualpipev", 2, 20, 1040),
        ("dualpipev", 4, 20, 1090),
        ("dualpipev", 8, 20, 1190),
        ("1f1b", 4, 20, 690),
        ("zb1p", 4, 20, 630),
    ],
)
def test_steps_take_as_long_as_deepseeks_replay(name: str, ranks: int, microbatches: int, step: float) -> None:
    assert timed(name, ranks, microbatches).step_time == step


def test_dualpipe_without_overlap_is_still_ahead_of_zb1p() -> None:
    schedule = find_schedule("dualpipe")(4, 20)
    assert simulate(schedule, Costs.uniform(4, UNIT, UNIT, UNIT, overlapped=WHOLE)).step_time == 620


@examples(60)
@given(ranks=st.integers(1, 12), groups=st.integers(1, 4), stages=st.integers(1, 4))
def test_interleaving_divides_the_bubble(ranks: int, groups: int, stages: int) -> None:
    schedule = find_schedule("interleaved")(ranks, ranks * groups, stages_per_rank=stages)
    timeline = simulate(schedule, Costs.uniform(schedule.num_stages, UNIT, UNIT, UNIT))
    assert max(timeline.bubble) == (ranks - 1) * WHOLE
    whole = simulate(find_schedule("1f1b")(ranks, ranks * groups), Costs.uniform(ranks, *3 * [stages * UNIT]))
    assert max(whole.bubble) == stages * max(timeline.bubble)


@examples(60)
@given(ranks=st.integers(1, 12), microbatches=st.integers(1, 48), stages=st.integers(2, 3))
def test_interleaving_any_number_of_microbatches_beats_1f1b(ranks: int, microbatches: int, stages: int) -> None:
    schedule = find_schedule("interleaved")(ranks, microbatches, stages_per_rank=stages)
    step = simulate(schedule, Costs.uniform(schedule.num_stages, UNIT, UNIT, UNIT)).step_time
    whole = simulate(find_schedule("1f1b")(ranks, microbatches), Costs.uniform(ranks, *3 * [stages * UNIT]))
    assert step <= whole.step_time


@examples(80)
@given(half=st.integers(1, 8), microbatches=st.integers(1, 40), defer=st.booleans())
def test_few_or_odd_microbatches_cost_a_bounded_bubble(half: int, microbatches: int, defer: bool) -> None:
    """Above P micro-batches the bubble is at most the full schedule's, plus a pair for an odd number."""
    ranks = 2 * half
    timeline = timed("dualpipe", ranks, microbatches, defer_weights=defer)
    if microbatches > ranks:
        full = (half - 1) * (PAIR - UNIT)
        assert max(timeline.bubble) <= full + microbatches % 2 * PAIR
    else:
        # A micro-batch takes its way through all stages and back, and its last W.
        assert timeline.step_time <= 2 * UNIT * ranks + UNIT + (microbatches - 1) * 2 * UNIT


@examples(60)
@given(half=st.integers(1, 8), microbatches=st.integers(1, 40))
def test_deferred_weights_leave_the_pairs_and_never_cost_time(half: int, microbatches: int) -> None:
    for name, ranks in (("dualpipe", 2 * half), ("dualpipev", half)):
        deferred = find_schedule(name)(ranks, microbatches, defer_weights=True)
        assert all(action.kind != "B" for _, _, action in deferred.work())
        plain = timed(name, ranks, microbatches)
        assert timed(name, ranks, microbatches, defer_weights=True).step_time <= plain.step_time
        assert max(check(deferred).peak) <= 2 * half + 1


def test_deferred_weights_shrink_the_bubble_of_v3s_ramp() -> None:
    """V3 began with 24 micro-batches on 16 ranks, fewer than the 32 of the full schedule."""
    assert timed("dualpipe", 16, 24).step_time == 790
    assert timed("dualpipe", 16, 24, defer_weights=True).step_time == 755
    assert timed("zb1p", 16, 24).step_time == 870


@pytest.mark.parametrize(("ranks", "near"), [(1, "take 2"), (3, "take 2 or 4"), (7, "take 6 or 8")])
def test_odd_ranks_are_refused_with_the_nearest_even(ranks: int, near: str) -> None:
    with pytest.raises(UsageError, match=f"got {ranks}: {near}, or dualpipev"):
        find_schedule("dualpipe")(ranks, 16)
    check(find_schedule("dualpipev")(ranks, 16))


def test_no_stage_per_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="stages_per_rank is 0"):
        find_schedule("interleaved")(4, 8, stages_per_rank=0)


@examples(60)
@given(schedule=schedules())
def test_stages_of_dual_schedules_are_mirrored_or_folded(schedule: Schedule) -> None:
    copies = {len(schedule.holders(stage)) for stage in range(schedule.num_stages)}
    assert copies == {2 if schedule.name == "dualpipe" else 1}
    if schedule.name.startswith("dualpipe"):
        last = schedule.num_stages - 1
        assert schedule.stages_of_rank == tuple((rank, last - rank) for rank in range(schedule.num_ranks))


def test_dualpipe_feeds_both_ends() -> None:
    schedule = find_schedule("dualpipe")(4, 9)
    entries = [(rank, part.microbatch) for rank, _, part in schedule.work() if part.kind == "F" and part.stage == 0]
    assert entries == [(0, m) for m in range(5)] + [(3, m) for m in range(5, 9)]


@examples(100)
@given(schedule=schedules())
def test_forwards_alone_can_run_and_keep_their_ranks(schedule: Schedule) -> None:
    forwards = forward_only(schedule)
    check(forwards, training=False)
    where = {(rank, part) for rank, _, part in schedule.work() if part.kind == "F"}
    assert {(rank, part) for rank, _, part in forwards.work()} == where


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 8), ("zb1p", 8), ("dualpipev", 4), ("dualpipe", 8)])
def test_forwards_alone_have_no_bubble_but_the_way_in(name: str, ranks: int) -> None:
    """The last stage begins when the first micro-batch has come through, and then never waits."""
    schedule = forward_only(find_schedule(name)(ranks, 24))
    timeline = simulate(schedule, Costs.uniform(schedule.num_stages, UNIT))
    assert timeline.step_time <= UNIT * (schedule.num_stages - 1 + 24 * len(schedule.stages_of_rank[0]))


def test_generators_are_pure() -> None:
    for name, options in VARIANTS:
        assert find_schedule(name)(4, 7, **options) == find_schedule(name)(4, 7, **options)


def test_actions_say_what_they_are() -> None:
    pair = Overlap(Action("F", 3, 1), Action("B", 0, 2))
    assert str(pair) == "pair of F1 of stage 3 and B2 of stage 0"
