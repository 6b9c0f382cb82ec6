"""The Triton kernels that quantise: the tests that need a GPU, and speeds against the operations that each fuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.tests.gpu.prove.report import Report
from counterflow.tests.gpu.prove.tools import Setup


class _Outcomes:
    """Plugin of pytest that counts outcomes and keeps the messages of failures."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            if report.outcome == "failed":
                self.failures.append(f"{report.nodeid}: {str(report.longrepr)[-400:]}")

    def pytest_collection_finish(self, session: Any) -> None:
        self.counts["collected"] = len(session.items)


def run(setup: Setup, report: Report) -> None:
    with report.attempt("tests of the kernels"):
        outcomes, folder = _Outcomes(), Path(__file__).parents[1]
        more = ["--collect-only"] if setup.rehearse else []
        files = [str(folder / "test_triton_gpu.py")]
        pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", *more, *files], plugins=[outcomes])
        for outcome, count in outcomes.counts.items():
            report.number(f"tests {outcome}", count)
        for failure in outcomes.failures[:20]:
            report.row("failures", test=failure)
        report.check("no test of a kernel fails", not outcomes.failures, len(outcomes.failures))
        report.check("there are tests", outcomes.counts.get("collected", 0) > 50, outcomes.counts)
    if setup.rehearse:
        from counterflow.benchmarks import triton_kernels

        report.check("there are speeds to measure", callable(triton_kernels.swiglu_cases))
        return
    from counterflow.benchmarks.triton_kernels import other_cases, swiglu_cases

    torch.manual_seed(0)
    with setup.alone():
        for case in (*swiglu_cases(8192), *other_cases(8192)):
            with report.attempt(case.name):
                case.fused()
                ours = setup.milliseconds(case.fused)
                plain = setup.milliseconds(lambda case=case: case.plain(*case.arguments), rounds=5)  # type: ignore[misc]
                report.row(
                    "speed, 8,192 rows at V3's widths",
                    kernel=case.name,
                    us=ours * 1e3,
                    unfused_us=plain * 1e3,
                    times_faster=plain / ours,
                    GB_per_s=case.bytes_moved / ours / 1e6,
                )
