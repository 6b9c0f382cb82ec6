"""Runs that do not fit into their devices: refused before the first step, with the figures."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import barrier

from counterflow.configs.config import Config
from counterflow.dryrun.rank import dry_run
from counterflow.launcher import memory_check
from counterflow.launcher.bootstrap import Process
from counterflow.launcher.memory_check import GIB, Need, check_memory, device_limit, judge
from counterflow.settings import UsageError
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import tiny, write_text
from counterflow.training.preflight import prepare_run
from counterflow.training.run_folder import write_config

CPU = torch.device("cpu")
NEEDS = {0: Need(50.0 * GIB, "F.head", 3.0 * GIB), 1: Need(70.0 * GIB, "B.experts", 3.0 * GIB)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("memory") / "text")


def test_the_largest_rank_with_its_allowances_decides(caplog: pytest.LogCaptureFixture) -> None:
    needed = 70.0 * 1.03 + 0.6 + 3.0
    with pytest.raises(UsageError, match=r"pipeline rank 1 needs 70.00 GiB .*, in B.experts: .* 75.70 of 75.60 GiB"):
        judge(NEEDS, 75.6 * GIB)
    with caplog.at_level(logging.INFO):
        judge(NEEDS, needed / 0.95 * GIB * 0.999)
        judge(NEEDS, needed / 0.95 * GIB * 1.001)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_cpus_have_a_limit_only_where_one_is_set(text: Path) -> None:
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    for setting, limit in (("auto", None), ("null", None), ("2.5", 2.5 * GIB)):
        assert device_limit(tiny(text, f"memory.limit_gib={setting}"), process) == limit


def test_all_ranks_refuse_what_a_dry_run_says_is_too_large_and_keep_it(pool: Pool, text: Path, tmp_path: Path) -> None:
    config = tiny(text, f"run.dir={tmp_path}", "parallel.pp=2", "memory.limit_gib=0.1", "run.name=large")
    messages = pool.run(_refused, 2, config)
    assert messages[0] == messages[1] and "does not fit" in messages[0]
    peaks = [dry_run(config, 2, rank, layer=False).peak_bytes for rank in (0, 1)]
    assert f"needs {max(peaks) / GIB:.2f} GiB of tensors" in messages[0]


def _refused(worker: Worker, config: Config) -> str:
    plan = prepare_run(config, worker.world_size, worker.world_size, Path())
    if worker.rank == 0:
        write_config(plan.run_dir, config)
    barrier()
    process = Process(worker.rank, worker.world_size, worker.rank, worker.world_size, CPU)
    with pytest.raises(UsageError) as refused:
        check_memory(plan, process)
    memory_check.measure = None  # type: ignore[assignment]  # the run folder has the results now
    enough = plan.config.memory.model_copy(update={"limit_gib": 100.0})
    check_memory(replace(plan, config=plan.config.model_copy(update={"memory": enough})), process)
    return str(refused.value)
