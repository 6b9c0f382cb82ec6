"""Transfers between pipeline ranks that pass through memory of the host."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm import p2p
from counterflow.comm.p2p import PipelineChannels, needs_staging
from counterflow.tests.pool import Pool, Worker


@pytest.mark.parametrize("staged", [False, True])
def test_tensors_arrive_unchanged(staged: bool, pool: Pool) -> None:
    def exchange(worker: Worker) -> list[Tensor]:
        channels = {(0, 1): dist.new_group([0, 1]), (1, 0): dist.new_group([0, 1])}
        own, shape, copies = PipelineChannels(worker.rank, channels), torch.Size((3, 5)), []
        other = 1 - worker.rank

        def on_host(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
            copies.append(torch.empty(shape, dtype=dtype))
            return copies[-1]

        with (
            mock.patch.object(p2p, "needs_staging", return_value=staged),
            mock.patch.object(p2p, "_on_host", on_host),
        ):
            arrived = []
            for number, dtype in enumerate((torch.float32, torch.bfloat16)):
                mine = _values(worker.rank, number, dtype)
                receiving = own.receive(shape, dtype, torch.device("cpu"), other)
                sending = own.send(mine, other)
                if staged:
                    mine.fill_(-1)  # what is sent is a copy
                arrived.append(receiving.wait())
                sending.wait()
        assert len(copies) == 4 * staged
        return arrived

    found = pool.run(exchange, 2)
    for rank in (0, 1):
        for number, dtype in enumerate((torch.float32, torch.bfloat16)):
            assert torch.equal(found[rank][number], _values(1 - rank, number, dtype))


def _values(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    """A matrix that is not contiguous."""
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * rank + number)).to(dtype).t()


def test_tensors_of_a_gpu_are_staged_where_the_library_is_gloo() -> None:
    for backend, device, expected in (
        ("gloo", "cuda", True),
        ("gloo", "cpu", False),
        ("gloo", "meta", False),
        ("nccl", "cuda", False),
        ("fake", "meta", False),
    ):
        with mock.patch.object(dist, "get_backend", return_value=backend):
            assert needs_staging(torch.device(device), mock.Mock()) is expected, (backend, device)
