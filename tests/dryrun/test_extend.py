"""Long steps that are extended from short ones, against the same steps run whole."""

from __future__ import annotations

import pytest

from counterflow.configs.load import load_config
from counterflow.dryrun import rank as ranks
from counterflow.dryrun.extend import fewest_microbatches
from counterflow.dryrun.rank import dry_run

SMALL = ("precision.recipe=bf16", "parallel.pp=2", "parallel.ep=2", "model.num_hidden_layers=4")


@pytest.mark.parametrize(
    "schedule",
    [
        "1f1b",
        "dualpipe",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("zb1p", "dualpipev", "interleaved", "gpipe")),
    ],
)
def test_an_extended_step_equals_the_whole_one(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny", (*SMALL, f"parallel.schedule={schedule}"))
    whole = dry_run(config, 4, 3, microbatches=24, layer=False)
    monkeypatch.setattr(ranks, "AT_ONCE", 0)
    extended = dry_run(config, 4, 3, microbatches=24, layer=False)
    if schedule != "gpipe":  # which keeps all micro-batches, so that no shorter step has its peak
        assert extended.run_microbatches < whole.run_microbatches == 24
    assert extended.work == whole.work and extended.traffic == whole.traffic
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)


def test_fewest_micro_batches_have_the_peak_of_the_full_batch() -> None:
    config = load_config("deepseek-v3-671b")
    # Steps of 24, 56 and 88 are whole periods shorter. 24 defer W elsewhere; 56 have the same peak, 88 a period of it.
    assert fewest_microbatches(config, 120) == 88
