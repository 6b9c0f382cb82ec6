"""Which steps a run has: how many, of which samples, with which values of the schedules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.sections import BatchConfig, BatchRamp
from counterflow.plan import steps as plan_steps
from counterflow.plan.steps import Progress, steps_from, total_steps

V3 = load_config("deepseek-v3-671b")


@st.composite
def batches(draw: st.DrawFn) -> BatchConfig:
    """Any batch, with or without a ramp."""
    increment, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    full = increment * draw(st.integers(1, 9))
    ramp = None
    if draw(st.booleans()):
        start = increment * draw(st.integers(1, full // increment))
        ramp = BatchRamp(start=start, tokens=draw(st.integers(1, 500)), increment=increment)
    return BatchConfig(sequence_length=length, global_sequences=full, ramp=ramp)


def with_train(batch: BatchConfig, **train: float | None) -> Config:
    return Config.model_validate({"train": train, "batch": batch.model_dump()})


@given(batches())
def test_steps_take_every_sample_once_in_order(batch: BatchConfig) -> None:
    samples = tokens = 0
    for number, (before, sequences) in enumerate(itertools.islice(steps_from(Progress(), batch), 40)):
        assert before == Progress(number, tokens, samples)
        samples += sequences
        tokens += sequences * batch.sequence_length


@given(batches(), st.integers(0, 30))
def test_steps_from_the_middle_are_the_rest_of_all_steps(batch: BatchConfig, done: int) -> None:
    every = list(itertools.islice(steps_from(Progress(), batch), done + 10))
    assert list(itertools.islice(steps_from(every[done][0], batch), 10)) == every[done:]


@given(batches())
def test_a_ramp_grows_in_increments_from_its_start_to_the_full_batch(batch: BatchConfig) -> None:
    if batch.ramp is None:
        assert {batch.sequences_at(tokens) for tokens in range(0, 600, 7)} == {batch.global_sequences}
        return
    sizes = [batch.sequences_at(tokens) for tokens in range(600)]
    assert (sizes[0], sizes[-1]) == (batch.ramp.start, batch.global_sequences)
    assert sizes == sorted(sizes)
    assert all((size - batch.ramp.start) % batch.ramp.increment == 0 for size in sizes)
    for tokens, size in enumerate(sizes[: int(batch.ramp.tokens)]):
        line = batch.ramp.start + (batch.global_sequences - batch.ramp.start) * tokens / batch.ramp.tokens
        assert line - batch.ramp.increment - 1e-9 <= size <= line + 1e-9


@given(batches(), st.floats(1, 3000))
def test_a_run_of_tokens_ends_at_the_first_step_that_reaches_them(batch: BatchConfig, tokens: float) -> None:
    last = total_steps(with_train(batch, tokens=tokens))
    reached = [before.tokens for before, _ in itertools.islice(steps_from(Progress(), batch), last + 1)]
    assert reached[last] >= tokens > reached[last - 1]


@given(batches(), st.floats(1, 3000), st.integers(1, 60))
def test_the_earlier_of_steps_and_tokens_ends_the_run(batch: BatchConfig, tokens: float, steps: int) -> None:
    by_tokens = total_steps(with_train(batch, tokens=tokens))
    assert total_steps(with_train(batch, tokens=tokens, steps=steps)) == min(by_tokens, steps)
    assert total_steps(with_train(batch, steps=steps)) == steps


@given(batches(), st.floats(1, 3000) | st.integers(1, 3000), st.none() | st.integers(1, 60))
def test_the_last_step_is_where_walking_step_by_step_ends(batch: BatchConfig, tokens: float, steps: int | None) -> None:
    seen = walked = 0
    while seen < tokens and walked != steps:
        seen += batch.sequences_at(seen) * batch.sequence_length
        walked += 1
    assert total_steps(with_train(batch, tokens=tokens, steps=steps)) == walked


@pytest.mark.parametrize("ramp", [None, BatchRamp(start=1, tokens=1000, increment=1)])
def test_the_steps_of_a_long_run_are_not_walked(ramp: BatchRamp | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quadrillion tokens in steps of 40: the checks before a start may not take longer than the run."""

    def few_steps(*args: Any) -> Iterator[tuple[Progress, int]]:
        return itertools.islice(steps_from(*args), 1000)

    monkeypatch.setattr(plan_steps, "steps_from", few_steps)
    batch = BatchConfig(sequence_length=5, global_sequences=8, ramp=ramp)
    steps = total_steps(with_train(batch, tokens=1e15))
    in_ramp = [at.tokens for at, _ in few_steps(Progress(), batch) if ramp is not None and at.tokens < ramp.tokens]
    tokens = sum(batch.sequences_at(before) for before in in_ramp) * batch.sequence_length
    full = steps - len(in_ramp)
    assert tokens + 40 * full >= 10**15 > tokens + 40 * (full - 1)
    assert total_steps(with_train(batch, tokens=1e15, steps=10**12)) == 10**12


def test_deepseek_v3_trains_14_8_trillion_tokens_with_its_batch_ramp() -> None:
    sizes = [V3.batch.sequences_at(tokens) for tokens in (0, 100e9, 469e9, 14e12)]
    # V3 §4.2: from 3072 sequences to 15360 in the first 469 B tokens, then 15360.
    assert (sizes[0], sizes[2], sizes[3]) == (3072, 15360, 15360)
    assert abs(sizes[1] - (3072 + 12288 * 100 / 469)) < V3.batch.ramp.increment
    steps = total_steps(V3)
    full = 14.8e12 / (15360 * 4096)
    # The ramp takes ln(15360 / 3072) / (1 - 3072 / 15360) times as many steps for its tokens as full batches would.
    extra = 469e9 / (15360 * 4096) * (1.6094 / 0.8 - 1)
    assert steps == pytest.approx(full + extra, rel=1e-3)
