"""Pool of processes: results, failures and hangs reach the test."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from counterflow.tests.pool import Pool, RankFailure, Worker


def _sum_of_ranks(worker: Worker, factor: int) -> int:
    total = torch.tensor(worker.rank * factor)
    dist.all_reduce(total)
    assert dist.get_world_size() == worker.world_size
    return int(total)


def test_every_run_has_a_world_of_its_size(pool: Pool) -> None:
    for world_size in (1, 2, 8, 3, 4):
        total = 10 * sum(range(world_size))
        assert pool.run(_sum_of_ranks, world_size, 10) == [total] * world_size


def test_groups_of_an_earlier_run_are_gone(pool: Pool) -> None:
    def groups(worker: Worker, make: bool) -> int:
        if make:
            dist.new_group([0, 1], use_local_synchronization=True)
        return len(dist.distributed_c10d._world.pg_map)

    assert pool.run(groups, 2, True) == [2, 2]
    assert pool.run(groups, 2, False) == [1, 1]


def test_the_rank_that_failed_first_is_the_cause(pool: Pool) -> None:
    def fail_on_two(worker: Worker) -> None:
        if worker.rank == 2:
            time.sleep(0.1)
            raise KeyError("the culprit")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(
        RankFailure, match=r"rank 2 of 4 failed:[\s\S]*fail_on_two[\s\S]*the culprit[\s\S]*rank 0 failed"
    ):
        pool.run(fail_on_two, 4)
    assert pool.run(_sum_of_ranks, 4, 1) == [6] * 4


def test_hung_and_dead_ranks_are_reported_and_replaced(pool: Pool) -> None:
    def wait_forever() -> None:
        time.sleep(1e6)

    def hang(worker: Worker) -> None:
        if worker.rank == 1:
            wait_forever()

    def die(worker: Worker) -> None:
        if worker.rank == 1:
            os._exit(9)

    pids = pool.run(lambda worker: os.getpid(), 8)
    with pytest.raises(RankFailure, match=r"ranks \[1\] were still running after 1 s[\s\S]*in wait_forever"):
        pool.run(hang, 2, timeout=1)
    with pytest.raises(RankFailure, match="the process of rank 1 died"):
        pool.run(die, 2)
    assert pool.run(_sum_of_ranks, 4, 1) == [6] * 4
    assert not [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
