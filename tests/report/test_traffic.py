"""Traffic in words and tables, and `counterflow report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterflow.launcher.cli import main
from counterflow.report.metrics import MetricsWriter, StepMetrics, read_metrics
from counterflow.report.traffic import Sent, bytes_over, describe_traffic, mean_step, traffic_table


def sent(purpose: str, link: str, bytes: int, messages: int = 1, collective: str = "all_to_all") -> Sent:
    return Sent(purpose=purpose, collective=collective, link=link, bytes=bytes, messages=messages)


STEP = (
    sent("dispatch", "within", 1024, 2),
    sent("dispatch", "between", 3 * 2**20, 4),
    sent("combine", "between", 2**20),
    sent("statistics", "within", 100, 6, "all_reduce"),
)


def metrics(step: int, traffic: tuple[Sent, ...] | None) -> StepMetrics:
    return StepMetrics(
        step=step, tokens=100 * step, sequences=2, loss=2.5, grad_norm=1.0, lr=1e-3, bias_update_speed=0.0,
        mtp_weight=0.3, tokens_per_second=1e4, mfu=0.25, memory_gib=1.0, step_seconds=2.0, traffic=traffic,
    )  # fmt: skip


def test_a_table_has_a_row_for_each_purpose_and_their_sum() -> None:
    assert traffic_table(STEP) == [
        ("dispatch", "all_to_all", "1.0 KiB", "2", "3.0 MiB", "4"),
        ("combine", "all_to_all", "-", "-", "1.0 MiB", "1"),
        ("statistics", "all_reduce", "100 B", "6", "-", "-"),
        ("all", "", "1.1 KiB", "8", "4.0 MiB", "5"),
    ]
    assert traffic_table(STEP[:1]) == [("dispatch", "all_to_all", "1.0 KiB", "2", "-", "-")]
    seldom = mean_step([STEP[2:3], [], []])
    assert traffic_table(seldom) == [("combine", "all_to_all", "-", "-", "341.3 KiB", "0")], "less than once per step"


def test_the_mean_of_steps_counts_a_kind_that_a_step_did_not_send_as_zero() -> None:
    mean = mean_step([STEP, STEP[:1]])
    assert {(each.purpose, each.link): (each.bytes, each.messages) for each in mean} == {
        ("dispatch", "within"): (1024, 2),
        ("dispatch", "between"): (3 * 2**19, 2),
        ("combine", "between"): (2**19, 0),
        ("statistics", "within"): (50, 3),
    }
    assert bytes_over(STEP, "between") == 4 * 2**20 and mean_step([]) == []


def test_a_line_names_what_fills_the_slow_links() -> None:
    assert describe_traffic(STEP) == ("1.1 KiB within nodes per step, 4.0 MiB between nodes, most of it dispatch (75%)")
    assert describe_traffic(STEP[:1]) == "1.0 KiB within nodes per step"
    assert describe_traffic(STEP[2:3]) == "1.0 MiB between nodes per step, most of it combine (100%)"
    assert describe_traffic(()) == "nothing is sent"


def test_metrics_keep_traffic_and_steps_without_it(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(metrics(1, STEP))
        writer.write(metrics(2, None))
    assert [step.traffic for step in read_metrics(tmp_path)] == [STEP, None]


def test_report_prints_a_run_in_80_columns_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(metrics(step, STEP))
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path) and all(len(line) <= 80 for line in lines[1:])
    assert any(line.split() == ["steps", "1", "to", "3"] for line in lines)
    assert any(line.split()[:4] == ["dispatch", "all_to_all", "1.0", "KiB"] for line in lines)
    assert main(["report", str(tmp_path), "--last", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first_step"], found["last_step"], found["loss"], found["mfu"]) == (2, 3, 2.5, 0.25)
    assert found["traffic"][1] == {
        "purpose": "dispatch", "collective": "all_to_all", "link": "between", "bytes": 3 * 2**20, "messages": 4,
    }  # fmt: skip


def test_report_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl: give the folder of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "records no step yet" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--last", "0"]) == 2
    assert "--last is 0" in capsys.readouterr().err
