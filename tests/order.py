"""Order of the test files, and which of them share a worker.

pytest-xdist gives whole files to its workers, in the order of collection. The files that take longest come first, so
that no worker is left with one of them at the end.
"""

from __future__ import annotations

from typing import Any

import pytest

SECONDS = {
    "tests/training/test_pipeline_properties.py": 80,
    "tests/training/test_pipelines.py": 70,
    "tests/training/test_layouts.py": 60,
    "tests/training/test_train_command.py": 60,
    "tests/verify/test_verify.py": 60,
    "tests/audit/test_audit.py": 50,
    "tests/fp8/test_triton_values.py": 50,
    "tests/training/test_dispatchers.py": 45,
    "tests/launcher/test_launch.py": 40,
    "tests/training/test_data_parallel_traffic.py": 35,
    "tests/training/test_expert_balance.py": 35,
    "tests/training/test_fp8.py": 35,
    "tests/training/test_pipeline_command.py": 35,
    "tests/training/test_routers.py": 35,
    "tests/training/test_te_backend.py": 35,
    "tests/training/test_gradients.py": 30,
    "tests/training/test_non_finite.py": 30,
    "tests/training/test_resume.py": 30,
    "tests/comm/test_deepep.py": 25,
    "tests/fp8/test_triton_compile.py": 25,
    "tests/training/test_bad_input.py": 25,
    "tests/parallel/optimizer/test_low_precision_state.py": 20,
    "tests/parallel/optimizer/test_replicas.py": 20,
    "tests/model/test_kernels.py": 15,
    "tests/model/test_loss.py": 15,
    "tests/model/test_parity.py": 15,
    "tests/model/test_recompute.py": 15,
    "tests/training/test_averaged_weights.py": 15,
    "tests/training/test_grids.py": 15,
    "tests/training/test_batches.py": 10,
}
"""Rough seconds of the longest files in `make test`, on one core of a Zen 3; other files count as 0."""

TOGETHER = {
    "tests/training/test_bad_input.py": "tests/training/test_layouts.py",
    "tests/training/test_batches.py": "tests/training/test_layouts.py",
    "tests/training/test_resume.py": "tests/training/test_layouts.py",
}
"""File, and the file whose worker runs it too, because both look at the same runs."""


def heavy_first(items: list[pytest.Item]) -> None:
    """Sort by the seconds of each item's file, in place; items of equal seconds keep their order."""
    total: dict[str, int] = {}
    for name, seconds in SECONDS.items():
        leader = TOGETHER.get(name, name)
        total[leader] = total.get(leader, 0) + seconds

    def seconds_of(item: pytest.Item) -> int:
        name = item.nodeid.partition("::")[0]
        return total.get(TOGETHER.get(name, name), 0)

    items.sort(key=seconds_of, reverse=True)


def file_scheduling(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` that keeps the order of collection and the files of `TOGETHER` on one worker."""
    from xdist.scheduler import LoadFileScheduling

    class InOrder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return InOrder(config, log)
