"""`counterflow simulate`: its figures against published ones, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from counterflow.configs.load import load_config
from counterflow.launcher.cli import main
from counterflow.parallel.schedule.catalogue import schedule_names
from counterflow.settings import UsageError
from counterflow.training.measure import EvenShare, measure_parts

KEYS = ["step_time", "bubble", "bubble_fraction", "peak_microbatches", "parameter_copies"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def simulate(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    code = main(["simulate", *arguments.split()])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, ""), printed.err
    return printed.out


def refused(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    code = main(["simulate", *arguments.split()])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    return printed.err


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "pair", "step_time"),
    [
        # What github.com/deepseek-ai/DualPipe's own step() takes when it is replayed with free communication.
        ("dualpipe", 4, 16, 25, 440),
        ("dualpipe", 4, 20, 25, 540),
        ("dualpipe", 8, 20, 25, 590),
        ("dualpipe", 16, 40, 25, 1190),
        ("dualpipev", 2, 20, 25, 1040),
        ("dualpipev", 4, 20, 25, 1090),
        ("dualpipev", 8, 20, 25, 1190),
        ("dualpipe", 4, 20, 30, 620),
        # (M + P - 1) (F + B), and the formula of V3's Table 2.
        ("1f1b", 4, 20, 30, 690),
        ("zb1p", 4, 20, 30, 630),
    ],
)
def test_steps_of_published_schedules_take_as_long_as_published(
    capsys: pytest.CaptureFixture[str], name: str, ranks: int, microbatches: int, pair: int, step_time: int
) -> None:
    costs = f"--forward 10 --backward-input 10 --backward-weight 10 --overlapped {pair}"
    numbers = f"--schedule {name} --ranks {ranks} --microbatches {microbatches} {costs}"
    figures = json.loads(simulate(capsys, f"{numbers} --json"))
    assert list(figures) == KEYS
    assert figures["step_time"] <= step_time * (1 + 1e-12)
    if pair == 25 and name == "dualpipe":
        assert max(figures["bubble"]) == pytest.approx((ranks / 2 - 1) * (25 + 20 - 3 * 10))
        assert figures["parameter_copies"] == 2
        assert figures["peak_microbatches"] == [ranks + 1] * ranks
    else:
        assert figures["step_time"] == pytest.approx(step_time)
    assert figures["bubble_fraction"] == pytest.approx(sum(figures["bubble"]) / figures["step_time"] / ranks)


def test_options_reach_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "--ranks 4 --microbatches 8 --forward 3 --json"
    one, three = (
        json.loads(simulate(capsys, f"--schedule interleaved --option stages_per_rank={stages} {numbers}"))
        for stages in (1, 3)
    )
    plain = json.loads(simulate(capsys, f"--schedule 1f1b {numbers}"))
    assert (one["step_time"], one["bubble"]) == (plain["step_time"], plain["bubble"])
    assert three["step_time"] - max(three["bubble"]) == pytest.approx(3 * (one["step_time"] - max(one["bubble"])))


def test_transfers_take_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "--schedule gpipe --ranks 4 --microbatches 1 --json"
    free, slow = (json.loads(simulate(capsys, f"{numbers} --p2p {p2p}"))["step_time"] for p2p in (0, 0.5))
    assert slow - free == pytest.approx(6 * 0.5)  # three boundaries, there and back


def test_comparison_has_every_schedule_and_says_why_one_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(simulate(capsys, "--ranks 7 --microbatches 20 --compare --json"))
    assert set(figures) == set(schedule_names())
    assert list(figures["dualpipe"]) == ["refused"]
    assert "needs an even number of pipeline ranks" in figures["dualpipe"]["refused"]
    assert all(list(figures[name]) == KEYS for name in figures if name != "dualpipe")
    table = simulate(capsys, "--ranks 7 --microbatches 20 --compare")
    names = [line.split()[0] for line in table.splitlines() if line.split()[:1] and line.split()[0] in figures]
    assert sorted(names) == sorted(figures)
    assert names[-1] == "dualpipe"
    times = [figures[name]["step_time"] for name in names[:-1]]
    assert times == sorted(times)


def test_own_schedule_is_compared_with_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(
        "from counterflow.parallel.schedule.interleaved import interleaved\n"
        "def mine(num_ranks, num_microbatches, *, stages=2):\n"
        "    return interleaved(num_ranks, num_microbatches, stages_per_rank=stages)\n"
    )
    numbers = "--ranks 4 --microbatches 8 --compare --schedule own.py:mine"
    figures = json.loads(simulate(capsys, f"{numbers} --json"))
    assert list(figures) == [*schedule_names(), "own.py:mine"]
    assert figures["own.py:mine"] == figures["interleaved"]
    one = json.loads(simulate(capsys, f"{numbers} --option stages=1 --json"))
    assert one["own.py:mine"] == figures["1f1b"]
    assert "own.py:mine " in simulate(capsys, numbers)


def test_equal_ranks_are_not_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    even = simulate(capsys, "--schedule dualpipe --ranks 4 --microbatches 10")
    assert "5.2% of all ranks' time; every rank waits 1.5\n" in even
    assert "every rank holds 5 micro-batches at a time, each of one stage\n" in even
    uneven = simulate(capsys, "--schedule 1f1b --ranks 2 --microbatches 2 --backward-weight 0 --p2p 1")
    assert "rank 0 holds most, 2 micro-batches at a time\n" in uneven
    alone = simulate(capsys, "--ranks 1 --microbatches 2")
    assert "0% of all ranks' time\n" in alone
    assert "rank 0 holds 1 micro-batch at a time\n" in alone


def test_pair_without_a_stated_cost_is_as_long_as_its_longer_half(capsys: pytest.CaptureFixture[str]) -> None:
    said = simulate(capsys, "--ranks 2 --microbatches 4 --forward 0")
    assert "pair 2 (assumed: as long as its longer half)" in said


def test_comparison_is_of_one_model_however_many_stages_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(simulate(capsys, "--ranks 4 --microbatches 8 --overlapped 3 --compare --json"))
    for one in figures.values():
        busy = {round(one["step_time"] - waits, 9) for waits in one["bubble"]}
        assert busy == {8 * 3.0}


def test_configs_pipeline_is_simulated_at_its_own_costs_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    v3 = json.loads(simulate(capsys, "deepseek-v3-671b --json"))
    assert list(v3) == KEYS
    assert (len(v3["bubble"]), v3["parameter_copies"], v3["peak_microbatches"]) == (16, 2, [17] * 16)
    # 120 micro-batches of 4096 tokens: 6 FLOPs for each of 37B active parameters, on 16 ranks.
    assert v3["step_time"] > 120 * 4096 * 6 * 37e9 / 16 / 1e12 * (2.5 / 3)
    slower = json.loads(simulate(capsys, "deepseek-v3-671b --pair-ratio 1 --json"))
    fewer = json.loads(simulate(capsys, "deepseek-v3-671b --microbatches 24 --json"))
    assert slower["step_time"] > v3["step_time"] > fewer["step_time"]
    assert fewer["bubble_fraction"] > v3["bubble_fraction"]
    costs = "--set parallel.stage_costs.dense_layer=1 --set parallel.stage_costs.moe_layer=1"
    even = json.loads(simulate(capsys, f"smoke --set parallel.pp=4 --set parallel.schedule=gpipe {costs} --json"))
    assert even["step_time"] == pytest.approx(2 + 3)  # 2 micro-batches of 4 x 4 sequences with dp = ep = 2


def test_text_states_what_it_assumes_and_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        "--ranks 4 --microbatches 6",
        "--ranks 40 --microbatches 100 --schedule zb1p",
        "deepseek-v3-671b",
        "deepseek-v3-671b --compare --p2p 0.1",
        "smoke --set parallel.pp=2",
        "tiny",
        "--ranks 3 --microbatches 2 --compare",
    ):
        text = simulate(capsys, arguments)
        assert max(map(len, text.splitlines())) <= 80, arguments
    v3 = simulate(capsys, "deepseek-v3-671b")
    assert "schedule     dualpipe, 16 stages on 16 ranks, 120 micro-batches\n" in v3
    assert "costs        TFLOP, predicted; a pair takes 0.833 of its parts' time (assumed)\n" in v3
    assert "head, 1 MTP module" in v3
    assert "parallel.dp is auto, taken as 2" in simulate(capsys, "smoke")
    assert "GFLOP, predicted" in simulate(capsys, "smoke")
    assert "pair 2.5 (assumed: 2.5/3 of its parts)" in simulate(capsys, "--ranks 2 --microbatches 2")
    assert "F 2, I 1, W 1, pair 3, transfer 0.5" in simulate(
        capsys, "--ranks 2 --microbatches 2 --forward 2 --overlapped 3 --p2p 0.5"
    )


def test_json_is_in_tflop_whatever_the_text_is_in(capsys: pytest.CaptureFixture[str]) -> None:
    text = simulate(capsys, "smoke")
    (shown,) = [line.split()[2:] for line in text.splitlines() if line.startswith("step time")]
    figures = json.loads(simulate(capsys, "smoke --json"))
    assert shown[1] == "GFLOP"
    assert figures["step_time"] * 1e3 == pytest.approx(float(shown[0]), rel=1e-3)


def test_page_with_the_drawings_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(capsys, "--ranks 4 --microbatches 8 --html one.html")
    simulate(capsys, "--ranks 4 --microbatches 8 --compare --html all.html")
    assert Path("one.html").read_text().lower().startswith("<!doctype html>")
    assert "<p>Costs: F 1, I 1, W 1, pair 2.5 (assumed: 2.5/3 of its parts)</p>" in Path("one.html").read_text()
    assert all(name in Path("all.html").read_text() for name in schedule_names())
    assert "No such file or directory" in refused(capsys, "--ranks 2 --microbatches 2 --html nowhere/x.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny --ranks 4", "--ranks does not go with a CONFIG: use --set parallel.pp=P"),
        ("tiny --schedule 1f1b", "--schedule does not go with a CONFIG: use --set parallel.schedule=NAME"),
        ("tiny --overlapped 2", "--overlapped does not go with a CONFIG: use --pair-ratio R"),
        ("--set parallel.pp=2 --ranks 2 --microbatches 2", "--set needs a CONFIG"),
        ("--ranks 2", "give a CONFIG, or numbers, of which --microbatches cannot be left out"),
        ("", "of which --ranks and --microbatches cannot be left out"),
        ("--ranks 2 --microbatches 2 --schedule 1f1b --compare", "--schedule does not go with --compare"),
        ("--ranks 2 --microbatches 2 --option a=1 --compare", "--option does not go with --compare"),
        ("--ranks 2 --microbatches 2 --schedule no.py:f --compare", "there is no file"),
        (
            "--ranks 2 --microbatches 2 --overlapped 0.1",
            "overlapped 0.1 is less than the longer of its halves, I + W = 2: at least 2",
        ),
        ("--ranks 2 --microbatches 2 --forward 3 --overlapped 2", "of its halves, F = 3: at least 3"),
        (
            "tiny --set parallel.pp=2 --pair-ratio 0.1",
            "pair ratio 0.1 is less than the longer half of a pair, as the ",
        ),
        ("--ranks 0 --microbatches 2", "argument --ranks: expects a whole number of at least 1, got '0'"),
        ("--ranks 2 --microbatches 2 --forward -1", "argument --forward: expects a number of at least 0, got '-1'"),
        ("--ranks 2 --microbatches 2 --forward nan", "argument --forward: expects a number of at least 0, got 'nan'"),
        ("--ranks 2 --microbatches 2 --option stages", "--option stages: expects KEY=VALUE"),
        (
            "--ranks 2 --microbatches 2 --schedule interleaved --option stage_per_rank=2",
            "did you mean stages_per_rank?",
        ),
        ("--ranks 2 --microbatches 2 --schedule dualpip", "Did you mean dualpipe"),
        ("--ranks 3 --microbatches 4 --schedule dualpipe", "got 3: take 2 or 4"),
        ("tiny --set parallel.pp=3", "3 makes 6 stages in schedule dualpipev"),
        ("tiny --set batch.micro_sequences=3", "8 sequences is not a multiple of 3 (dp 1 x batch.micro_sequences 3)"),
        ("tiny --measure --json", "--json does not go with --measure"),
        (
            "--ranks 2 --microbatches 2 --forward 0 --backward-input 0 --backward-weight 0",
            "nothing would take any time",
        ),
    ],
)
def test_bad_usage_is_refused_with_what_to_do(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert message in refused(capsys, arguments)


def test_all_misplaced_arguments_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "tiny --ranks 2 --forward 1 --option a=1")
    assert all(f"{flag} does not go with a CONFIG" in said for flag in ("--ranks", "--forward", "--option"))


def test_measured_costs_can_be_pasted_into_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "tiny", "--measure", "--set", "memory.recompute=v3"]) == 0
    Path("measured.yaml").write_text("base: tiny\n" + capsys.readouterr().out)
    costs = load_config("measured.yaml", ["parallel.pp=2"]).parallel.stage_costs
    assert costs is not None
    assert min(costs.dense_layer, costs.moe_layer, costs.head, costs.embedding) > 0
    assert costs.mtp_module > costs.moe_layer + costs.head


def test_model_too_large_to_measure_is_refused_with_the_numbers() -> None:
    config = load_config("deepseek-v3-671b", ["parallel.dp=auto", "run.device=cpu", "batch.micro_sequences=9999"])
    with pytest.raises(UsageError, match=r"takes about \d+\.\d GiB, and .* are free on cpu: set a larger parallel.ep"):
        measure_parts(config, torch.device("cpu"))


def test_measured_rank_gets_as_many_rows_as_an_even_router_sends_it() -> None:
    share, x = EvenShare(3), torch.randn(5, 4, requires_grad=True)
    sent = share.dispatch(x, torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2))
    assert (sent.x.shape, sent.tokens_per_expert, sent.offsets.tolist()) == ((10, 4), [3, 3, 4], [3, 6, 10])
    torch.testing.assert_close(share.combine(sent.x, sent), 2 * x)
