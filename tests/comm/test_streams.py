"""Streams beside the one that computes, seen through stand-ins: which work runs where, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

from counterflow.comm import routed, streams
from counterflow.comm.hops import HoppedTransfer, Hops
from counterflow.comm.routed import DispatchOptions
from counterflow.comm.streams import OnItsWay, beside, lend, on_launch_stream
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.kernels.launch import Launch, launch_stream
from counterflow.tests.comm.launches import Size, launches_of

SMALL = Size([0, 0, 1, 1], 8, 3, 32, 64, 2)
CUDA = torch.device("cuda", 0)


def test_work_between_hops_runs_beside_and_the_rest_does_not() -> None:
    log: list[str] = []
    place = ["computing"]

    @contextmanager
    def aside() -> Iterator[None]:
        place.append("relay")
        yield
        place.pop()

    def hops() -> Hops[str]:
        for number in range(3):
            log.append(f"launch {number + 1}: {place[-1]}")
            yield
        log.append(f"end: {place[-1]}")
        return "done"

    expected = ["launch 1: computing", "launch 2: relay", "launch 3: relay", "end: computing"]
    for advances in range(3):
        log.clear()
        transfer = HoppedTransfer(hops(), 3, 1, aside)
        for _ in range(advances):
            transfer.advance()
        assert transfer.wait() == "done" and log == expected and place == ["computing"], advances


@pytest.mark.parametrize("kind", ["flat", "two-hop"])
def test_a_gpu_launches_all_hops_at_once(kind: str) -> None:
    """Only sums and gathers are left for the phases that wait."""
    waiting = ("F.experts", "F.finish")
    seen = launches_of(kind, SMALL, DispatchOptions()).seen
    assert all("all_to_all" not in seen[phase] for phase in waiting), seen
    assert seen["F.dispatch"]["all_to_all"] == 2 and seen["F.combine"]["all_to_all"] == (2 if kind == "two-hop" else 1)


def test_a_group_of_one_rank_has_nothing_beside() -> None:
    """Its exchanges order no streams."""
    ids, weights = torch.tensor([[2, 0]]), torch.rand(1, 2)
    with mock.patch.object(routed, "HoppedTransfer", wraps=HoppedTransfer) as alone:
        TwoHopDispatcher(None, 4).dispatch(torch.randn(1, 8), ids, weights)
    assert alone.call_args.args[3] is nullcontext
    with mock.patch.object(routed, "HoppedTransfer", wraps=HoppedTransfer) as together:
        launches_of("two-hop", SMALL, DispatchOptions())
    assert together.call_args.args[3].args == (torch.device("meta"),)


class _Stream:
    """Stand-in for a stream that notes what it waits for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: str) -> None:
        self.log.append(f"behind {other}")


def test_kernels_and_exchanges_run_beside_in_memory_of_the_stream_that_computes() -> None:
    log: list[str] = []
    tensor, stream = mock.Mock(device=CUDA), _Stream(log)
    run = mock.Mock(side_effect=lambda *given, **options: log.append(f"kernel {launch_stream() is stream}"))
    kernel = mock.MagicMock(__getitem__=lambda kernel, grid: run)
    with (
        mock.patch.object(streams, "_stream", return_value=stream),
        mock.patch.object(torch.cuda, "current_stream", return_value="computing"),
        mock.patch.object(torch.cuda, "stream", side_effect=lambda made: nullcontext(log.append("current"))),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    ):
        launch = Launch(kernel, 1, (mock.Mock(spec=Tensor, device=CUDA),), {}, 4)
        lend(tensor)
        assert not tensor.record_stream.called
        with beside(CUDA):
            launch.run()
            with on_launch_stream(CUDA):
                log.append("exchange")
            lend(tensor)
        launch.run()
        with on_launch_stream(CUDA):
            log.append("exchange here")
    tensor.record_stream.assert_called_once_with(stream)
    expected = ["behind computing", "current", "kernel True", "current", "exchange", "kernel False", "exchange here"]
    assert log == expected


def test_without_a_gpu_nothing_is_beside() -> None:
    with beside(torch.device("meta")):
        assert launch_stream() is None
        lend(torch.empty(1))


def test_counts_are_copied_beside_and_waited_for_alone() -> None:
    log: list[str] = []

    class Event:
        def record(self, stream: _Stream) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("host waits")

    @contextmanager
    def current(stream: _Stream) -> Iterator[None]:
        log.append("in")
        yield
        log.append("out")

    def numbers() -> Tensor:
        log.append("exchanged")
        return torch.arange(4)

    plain_empty = torch.empty
    with (
        mock.patch.object(streams, "_stream", return_value=_Stream(log)),
        mock.patch.object(torch.cuda, "current_stream", return_value="computing"),
        mock.patch.object(torch.cuda, "stream", current),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch, "empty", lambda shape, dtype, pin_memory: plain_empty(shape, dtype=dtype)),
    ):
        counts = OnItsWay(CUDA, numbers)
        log.append("computes on")
        assert counts.wait().tolist() == [0, 1, 2, 3]
    assert log == ["behind computing", "in", "exchanged", "event", "out", "computes on", "host waits"]


def test_counts_on_a_cpu_are_exchanged_when_they_are_needed() -> None:
    log: list[str] = []

    def numbers() -> Tensor:
        log.append("exchanged")
        return torch.arange(2)

    counts = OnItsWay(torch.device("cpu"), numbers)
    assert log == [] and counts.wait().tolist() == [0, 1] and log == ["exchanged"]
